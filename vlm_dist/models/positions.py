"""Positions of a sample that shares its row with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def position_rule(model: Any) -> Callable[[Any], torch.Tensor] | None:
    """For models with M-RoPE (Qwen2-VL, https://arxiv.org/abs/2409.12191, section 2.1): from one encoded sample of L tokens to its
    position ids [4, L]: 0, 1, 2, ..., which tell transformers where samples begin, then time, height and width as the model itself
    computes them for the sample alone. None for all others: theirs are 0, 1, 2, ... and nothing else.
    """
    owner = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    if owner is None:
        return None

    def positions(sample: Any) -> torch.Tensor:
        import torch

        ids = sample.inputs["input_ids"]
        grids = {name: sample.inputs.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
        types = sample.inputs.get("mm_token_type_ids", torch.zeros_like(ids))
        rope, _ = owner.get_rope_index(ids, mm_token_type_ids=types, attention_mask=torch.ones_like(ids), **grids)
        return torch.cat([torch.arange(ids.shape[1]).view(1, -1), rope[:, 0].to(ids.dtype)])

    return positions
