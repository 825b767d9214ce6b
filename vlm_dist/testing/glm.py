"""Tiny checkpoints of GLM-4.1V, and of GLM-4.5V with experts (each stored by itself)."""

from __future__ import annotations

from typing import Any

from vlm_dist.testing.parts import small_text, small_tokenizer, template

GLM_IMAGE = ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>")
GLM_VIDEO = ("<|begin_of_video|>", "<|video|>", "<|end_of_video|>")
GLM_VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64, "image_size": 56}
GLM_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "partial_rotary_factor": 1.0}


def glm4v_of(name: str, **text: Any) -> tuple[Any, Any]:
    """One of the two, by the name of its classes."""
    import transformers as hf

    tokenizer, ids = small_tokenizer(*GLM_IMAGE, *GLM_VIDEO)
    pixels = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
    processor = hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(**pixels),
        tokenizer,
        hf.Glm4vVideoProcessor(**pixels),
        chat_template=template("".join(GLM_IMAGE), "".join(GLM_VIDEO)),
    )
    config = getattr(hf, f"{name}Config")(
        text_config=small_text(len(ids), rope_parameters=GLM_ROPE, **text), vision_config=GLM_VISION, image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"], image_start_token_id=ids[GLM_IMAGE[0]], image_end_token_id=ids[GLM_IMAGE[2]],
        video_start_token_id=ids[GLM_VIDEO[0]], video_end_token_id=ids[GLM_VIDEO[2]],
    )  # fmt: skip
    return processor, getattr(hf, f"{name}ForConditionalGeneration")(config)


def glm4v() -> tuple[Any, Any]:
    return glm4v_of("Glm4v")


def glm4v_moe() -> tuple[Any, Any]:
    """A dense layer, then two with four experts and a shared one; a router with sigmoids and a correction."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return glm4v_of("Glm4vMoe", num_hidden_layers=3, first_k_dense_replace=1, **experts)
