"""A processor's tensors back to pictures: what the vision tower is shown, after resizing, cropping and cutting into tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_dist.data.encode import Encoded

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


def pictures_as_seen(encoded: Encoded, processor: Any) -> list[Image]:
    """Each picture, or each tile of it; empty where the processor's form is not known (flattened patches without a grid)."""
    from PIL import Image

    found = []
    for pixels in _tiles(encoded.inputs, processor.image_processor):
        values = _before_normalising(pixels, processor.image_processor).clamp(0, 255).round().byte()
        found.append(Image.fromarray(values.permute(1, 2, 0).contiguous().numpy()))
    return found


def patch_size(processor: Any) -> int | None:
    """Pixels on a side of what becomes one patch, if the processor knows."""
    size = getattr(processor.image_processor, "patch_size", None) or getattr(processor, "patch_size", None)
    if isinstance(size, dict):
        size = size.get("height")
    return int(size) if size else None


def _tiles(inputs: dict[str, Any], image_processor: Any) -> list[torch.Tensor]:
    """[3, H, W] each, normalised."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return []
    if pixels.ndim == 2 and "image_grid_thw" in inputs:
        return _from_patches(pixels, inputs["image_grid_thw"].tolist(), image_processor)
    if pixels.ndim < 4 or pixels.shape[-3] != 3:
        return []
    tiles = pixels.reshape(-1, *pixels.shape[-3:])
    return [tile for tile in tiles if tile.any()]  # a picture with fewer tiles than another is filled up with zeros


def _from_patches(rows: torch.Tensor, grids: list[list[int]], image_processor: Any) -> list[torch.Tensor]:
    """Qwen2-VL's order of patches (time, height, width, then inside each merged square; channel, frame, row, column of a pixel)."""
    side, frames, merge = image_processor.patch_size, image_processor.temporal_patch_size, image_processor.merge_size
    found, start = [], 0
    for time, height, width in grids:
        count = time * height * width
        cut = rows[start : start + count].reshape(time, height // merge, width // merge, merge, merge, 3, frames, side, side)
        found.append(cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(time, frames, 3, height * side, width * side)[0, 0])
        start += count
    return found


def _before_normalising(pixels: torch.Tensor, image_processor: Any) -> torch.Tensor:
    import torch

    pixels = pixels.float()
    if getattr(image_processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(image_processor, name)).view(-1, 1, 1) for name in ("image_mean", "image_std"))
        pixels = pixels * std + mean
    return pixels / getattr(image_processor, "rescale_factor", 1 / 255) if getattr(image_processor, "do_rescale", True) else pixels
