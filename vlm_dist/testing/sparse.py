"""Tiny checkpoints of further architectures with experts: Qwen3.5 (with a shared one), GLM-4.5V (each expert stored by itself)."""

from __future__ import annotations

from typing import Any

from vlm_dist.testing.parts import small_text, small_tokenizer, template
from vlm_dist.testing.qwen import QWEN3_5_TEXT, QWEN3_5_VISION, QWEN3_PIXELS, QWEN3_ROPE, qwen

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}


def qwen3_5_moe() -> tuple[Any, Any]:
    """As `qwen3_5`, with four experts and one that all tokens share."""
    text = {**QWEN3_5_TEXT, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64}
    rope = {**QWEN3_ROPE, "partial_rotary_factor": 1.0}
    return qwen("Qwen3_5Moe", QWEN3_5_VISION, rope, QWEN3_PIXELS, "Qwen3VLVideoProcessor", processor="Qwen3VLProcessor", **text)


def glm4v_moe() -> tuple[Any, Any]:
    """A dense layer, then two with four experts and a shared one; a router with sigmoids and a correction."""
    import transformers as hf

    image, video = ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>"), ("<|begin_of_video|>", "<|video|>", "<|end_of_video|>")
    tokenizer, ids = small_tokenizer(*image, *video)
    pixels = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
    processor = hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(**pixels), tokenizer, hf.Glm4vVideoProcessor(), chat_template=template("".join(image))
    )
    text = small_text(
        len(ids), num_hidden_layers=3, n_routed_experts=4, first_k_dense_replace=1, **EXPERTS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "partial_rotary_factor": 1.0},
    )  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64, "image_size": 56,
    }  # fmt: skip
    config = hf.Glm4vMoeConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image|>"], video_token_id=ids["<|video|>"],
        image_start_token_id=ids[image[0]], image_end_token_id=ids[image[2]], video_start_token_id=ids[video[0]],
        video_end_token_id=ids[video[2]],
    )  # fmt: skip
    return processor, hf.Glm4vMoeForConditionalGeneration(config)
