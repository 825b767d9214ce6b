"""Tiny checkpoints of the Qwen families: M-RoPE, windows, deepstack, gated delta rule, experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_dist.testing.parts import TEXTS, small_text, train_tokenizer, turns

QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_BEFORE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"  # as Qwen's own
)
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
QWEN_TEMPLATE = turns("<|im_start|>", "<|im_end|>", "<|vision_start|><|image_pad|><|vision_end|>", video=QWEN_VIDEO, before=QWEN_BEFORE)


def qwen(
    name: str, vision: dict[str, Any], rope: dict[str, Any], images: dict[str, Any], video: str, *, processor: str = "",
    texts: Sequence[str] = TEXTS, **text: Any,
) -> tuple[Any, Any]:  # fmt: skip
    import transformers as hf

    tokenizer = train_tokenizer(QWEN, pad="<|endoftext|>", eos="<|im_end|>", texts=texts)
    ids = tokenizer.get_vocab()
    made = getattr(hf, processor or f"{name}Processor")(
        hf.Qwen2VLImageProcessor(**images), tokenizer, getattr(hf, video)(**images), chat_template=QWEN_TEMPLATE
    )
    special = {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    config = getattr(hf, f"{name}Config")(
        text_config=small_text(len(ids), **special, rope_parameters=rope, **text),
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return made, getattr(hf, f"{name}ForConditionalGeneration")(config)


QWEN2_PIXELS = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}
QWEN3_PIXELS = {"size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, "patch_size": 16}


def qwen2_vl() -> tuple[Any, Any]:
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 4}
    return qwen("Qwen2VL", vision, {"mrope_section": [2, 3, 3]}, QWEN2_PIXELS, "Qwen2VLVideoProcessor")


def qwen2_5_vl() -> tuple[Any, Any]:
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return qwen("Qwen2_5_VL", vision, {"mrope_section": [2, 3, 3]}, QWEN2_PIXELS, "Qwen2VLVideoProcessor")


QWEN3_VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64, "patch_size": 16,
    "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
}  # fmt: skip
QWEN3_ROPE = {"mrope_section": [2, 3, 3], "mrope_interleaved": True}


def qwen3_vl() -> tuple[Any, Any]:
    """Three language layers: the second deepstack feature, added behind the second, then meets one more."""
    return qwen("Qwen3VL", QWEN3_VISION, QWEN3_ROPE, QWEN3_PIXELS, "Qwen3VLVideoProcessor", head_dim=16, num_hidden_layers=3)


def qwen3_vl_moe() -> tuple[Any, Any]:
    """The same with eight experts a layer, two for each token; of the experts are 294,912 parameters."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "tie_word_embeddings": False}
    text = {"head_dim": 16, "num_hidden_layers": 3, **experts}
    return qwen("Qwen3VLMoe", QWEN3_VISION, QWEN3_ROPE, QWEN3_PIXELS, "Qwen3VLVideoProcessor", processor="Qwen3VLProcessor", **text)


QWEN3_5_VISION = {name: value for name, value in QWEN3_VISION.items() if name != "deepstack_visual_indexes"}
QWEN3_5_TEXT = {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip


def qwen3_5() -> tuple[Any, Any]:
    """A gated-delta-rule layer and a full-attention layer; Qwen3-VL's processor."""
    rope = {**QWEN3_ROPE, "partial_rotary_factor": 1.0}
    return qwen("Qwen3_5", QWEN3_5_VISION, rope, QWEN3_PIXELS, "Qwen3VLVideoProcessor", processor="Qwen3VLProcessor", **QWEN3_5_TEXT)
