"""A tiny checkpoint of Qwen3.5 with experts, one of them shared."""

from __future__ import annotations

from typing import Any

from vlm_dist.testing.qwen import QWEN3_5_TEXT, QWEN3_5_VISION, QWEN3_PIXELS, QWEN3_ROPE, qwen

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}


def qwen3_5_moe() -> tuple[Any, Any]:
    """As `qwen3_5`, with four experts and one that all tokens share."""
    text = {**QWEN3_5_TEXT, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64}
    rope = {**QWEN3_ROPE, "partial_rotary_factor": 1.0}
    return qwen("Qwen3_5Moe", QWEN3_5_VISION, rope, QWEN3_PIXELS, "Qwen3VLVideoProcessor", processor="Qwen3VLProcessor", **text)
