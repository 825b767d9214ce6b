"""What a model works out from a micro-batch's integers, worked out beside the training, on the CPU.

On a GPU each such question makes the host wait for the device: how many patches a picture has, where windows begin, which rows have a
label. What answers them is given to the model with the batch, or stays on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import vision_utils

from vlm_dist.models.introspect import family_of
from vlm_dist.models.loss import IGNORED
from vlm_dist.upstream.transformers import attention_of

GRIDS = ("image_grid_thw", "video_grid_thw")
ON_HOST = (*GRIDS, "image_cu_seqlens", "image_cu_window_seqlens", "num_datasets", "picture_tokens")
"""What a model only asks: how long, and how many."""
Batch = dict[str, Any]


def ahead_rule(model: Any) -> Callable[[Batch], Batch]:
    """From a collated micro-batch on the CPU to the same with what this model would work out of it: `position_ids` [3, B, T] with M-RoPE,
    `image_*` (see `transformers.vision_utils`) for towers that take them, and for our own kernels `supervised_rows` [P] (the places of a
    flattened [B T] that predict a supervised token) and `picture_tokens`, their number; for attention by lengths `sample_starts` [N + 1]
    and `longest_sample`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = family_of(base)
    tower = base.get_submodule(family.vision) if family.tower_takes_sizes else None
    owner = next((module for module in base.modules() if hasattr(module, "get_rope_index")), None)
    picture = getattr(base.config, "image_token_id", None)
    by_lengths = hasattr(base, "sample_lengths")

    def ahead(batch: Batch) -> Batch:
        found = dict(batch)
        if owner is not None and "position_ids" not in batch:
            found |= _positions(owner, batch)
        if tower is not None and "image_grid_thw" in batch:
            found |= {f"image_{name}": value for name, value in of_tower(tower, batch["image_grid_thw"]).items()}
        supervised = (torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED) != IGNORED).flatten()
        found["supervised_rows"] = supervised.nonzero().squeeze(1)
        if by_lengths:
            found |= _samples(batch)
        if picture is not None:
            found["picture_tokens"] = (batch["input_ids"] == picture).sum()
        return found

    return ahead


def _positions(owner: Any, batch: Batch) -> Batch:
    """As the model computes them (`compute_3d_position_ids`)."""
    grids = {name: batch.get(name) for name in GRIDS}
    if "mm_token_type_ids" not in batch or all(grid is None for grid in grids.values()):
        return {}
    names = ("mm_token_type_ids", "second_per_grid_ts", "attention_mask")
    positions, _ = owner.get_rope_index(batch["input_ids"], **grids, **{name: batch[name] for name in names if name in batch})
    return {"position_ids": positions}


def _samples(batch: Batch) -> Batch:
    """Where samples begin in the flattened [B T], and B T; what pads a row is one more. Positions tell them apart as transformers does:
    what does not count on from the token before begins anew."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        begins = mask.diff(prepend=mask[:, :1]) != 0
    else:
        positions = positions if positions.ndim == 2 else positions[0]
        begins = positions.diff(prepend=positions[:, :1] - 1) != 1
    begins[:, 0] = True
    starts = torch.cat([begins.flatten().nonzero().squeeze(1), torch.tensor([begins.numel()])])
    return {"sample_starts": starts.to(torch.int32), "longest_sample": int(starts.diff().max())}


def of_tower(tower: Any, grid: torch.Tensor) -> dict[str, Any]:
    """What a tower's pictures of any size [P, 3] mean for it, by the functions that it would call itself."""
    merge = tower.spatial_merge_size
    lengths = {"cu_seqlens": vision_utils.get_vision_cu_seqlens(grid)}
    found: dict[str, Any] = {"position_ids": vision_utils.get_vision_position_ids(grid, merge)}
    if hasattr(tower, "window_size"):
        sizes = {"spatial_merge_size": merge, "window_size": tower.window_size, "patch_size": tower.patch_size}
        found["window_index"], lengths["cu_window_seqlens"] = vision_utils.get_vision_window_index(grid, **sizes)
    if hasattr(tower, "num_grid_per_side"):
        settings = {"mode": tower.interpolation_mode, "align_corners": tower.interpolation_align_corners, "spatial_merge_size": merge}
        found["interp_indices"], found["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, tower.num_grid_per_side, **settings
        )
    if "flash" in attention_of(tower.config):
        found |= {name.replace("cu_", "max_").replace("seqlens", "seqlen"): int(all_.diff().max()) for name, all_ in lengths.items()}
    return found | lengths


def stays_on_host(name: str, batch: Batch) -> bool:
    """Whether an entry of a micro-batch is only asked by the host; flash-attention takes on the card where windows begin."""
    return name in ON_HOST and not (name.startswith("image_cu_") and "image_max_seqlen" in batch)


def placed(batch: Batch, device: torch.device) -> Batch:
    """A micro-batch on the device; what the host asks stays where it is."""
    return {
        name: value if not isinstance(value, torch.Tensor) or stays_on_host(name, batch) else value.to(device, non_blocking=True)
        for name, value in batch.items()
    }
