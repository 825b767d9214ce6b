"""A processor's tensors back to pictures: what the vision tower is shown, after resizing, cropping and cutting into tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_dist.data.encoded import VIDEO_PIXELS, Encoded

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

A_ROW = 8  # frames of a strip


def pictures_as_seen(encoded: Encoded, processor: Any) -> list[Image]:
    """Each picture, or each tile of it; empty where the processor's form is not known (flattened patches without a grid)."""
    from PIL import Image

    found = []
    for pixels in _tiles(encoded.inputs, processor.image_processor):
        values = _before_normalising(pixels, processor.image_processor).clamp(0, 255).round().byte()
        found.append(Image.fromarray(values.permute(1, 2, 0).contiguous().numpy()))
    return found


def videos_as_seen(encoded: Encoded, processor: Any) -> list[list[Image]]:
    """The frames of each video that went the processor's own road; those that became pictures are among `pictures_as_seen`."""
    from PIL import Image

    pixels = encoded.inputs.get(VIDEO_PIXELS)
    if pixels is None:
        return []
    own = processor.video_processor
    grids = encoded.inputs.get("video_grid_thw")
    clips = list(pixels) if grids is None else _frames_from_patches(pixels, grids.tolist(), own)
    shown = [_before_normalising(frames, own).clamp(0, 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy() for frames in clips]
    return [[Image.fromarray(frame) for frame in frames] for frames in shown]


def strip(frames: Sequence[Image], times: Sequence[float], height: int = 96) -> Image:
    """Frames side by side, `A_ROW` at most, each with its second below."""
    from PIL import Image, ImageDraw

    width = max(1, round(frames[0].width * height / frames[0].height))
    rows, columns = -(-len(frames) // A_ROW), min(len(frames), A_ROW)
    made = Image.new("RGB", (columns * (width + 2), rows * (height + 14)), "white")
    draw = ImageDraw.Draw(made)
    for number, frame in enumerate(frames):
        x, y = number % A_ROW * (width + 2), number // A_ROW * (height + 14)
        made.paste(frame.resize((width, height)), (x, y))
        second = times[min(number, len(times) - 1)]  # what fills up a step of two frames is the last one again
        draw.text((x + 2, y + height + 2), f"{second:.1f} s", fill="black")
    return made


def shows_pictures_whole(encoded: Encoded, seen: list[Image], count: int) -> bool:
    """Whether `pictures_as_seen` gave one picture for each of `count`, none cut into tiles or filled up to a canvas."""
    filled = {"pixel_attention_mask", "aspect_ratio_ids"} & set(encoded.inputs)
    return len(seen) == count and not filled


def patch_size(processor: Any) -> int | None:
    """Pixels on a side of what becomes one patch, if the processor knows."""
    size = getattr(processor.image_processor, "patch_size", None) or getattr(processor, "patch_size", None)
    if isinstance(size, dict):
        size = size.get("height")
    return int(size) if size else None


def feature_maps(features: torch.Tensor, encoded: Encoded, processor: Any) -> list[torch.Tensor]:
    """The norm of each patch's feature, laid out as the patches lie in the pictures of `pictures_as_seen`; empty where the layout of this
    vision tower is not known.

    Args:
        features: what the vision tower gives: [patches, D], or [pictures or tiles, patches, D], with a class token before them or not;
            or maps [pictures, D, rows, columns].

    Returns:
        [rows, columns] of each picture or tile.
    """
    features = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
    norms = features.float().norm(dim=-1)
    if "image_grid_thw" in encoded.inputs:
        return _maps_of_merged(norms.flatten(), encoded.inputs["image_grid_thw"].tolist(), processor.image_processor.merge_size)
    sizes = [(tile.shape[-2], tile.shape[-1]) for tile in _tiles(encoded.inputs, processor.image_processor)]
    if sizes and norms.ndim == 2 and norms.shape[0] == len(sizes):
        grids = [max(_grid(norms.shape[1], size), _grid(norms.shape[1] - 1, size)) for size in sizes]
        parts = [row[row.numel() - rows * columns :] for row, (rows, columns) in zip(norms, grids, strict=True)]  # a class token is first
    else:  # one behind the other, without what pads the smaller pictures
        sizes = [(int(height), int(width)) for height, width in encoded.inputs.get("image_sizes", [])] or sizes
        pixels = sum(height * width for height, width in sizes)
        grids = [_grid(round(norms.numel() * height * width / pixels), (height, width)) for height, width in sizes]
        parts = norms.flatten().split([rows * columns for rows, columns in grids]) if sum(r * c for r, c in grids) == norms.numel() else []
    if not parts or (0, 0) in grids:
        return []
    return [part.view(grid) for part, grid in zip(parts, grids, strict=True)]


def _grid(patches: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of so many square patches in a picture of (height, width); (0, 0) where they are not square."""
    height, width = size
    side = round((height * width / patches) ** 0.5) if patches > 0 else 0
    if not side or height % side or width % side or (height // side) * (width // side) != patches:
        return 0, 0
    return height // side, width // side


def _maps_of_merged(norms: torch.Tensor, grids: list[list[int]], merge: int) -> list[torch.Tensor]:
    """Patches in Qwen2-VL's order; or what GLM-4.5V makes of squares of them."""
    found, start = [], 0
    if norms.numel() * merge**2 == sum(time * height * width for time, height, width in grids):
        grids, merge = [[time, height // merge, width // merge] for time, height, width in grids], 1
    for time, height, width in grids:
        count = time * height * width
        cut = norms[start : start + count].view(time, height // merge, width // merge, merge, merge)
        found.append(cut.permute(0, 1, 3, 2, 4).reshape(time, height, width)[0])
        start += count
    return found


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
    return [frames[0] for frames in _frames_from_patches(rows, grids, image_processor)]


def _frames_from_patches(rows: torch.Tensor, grids: list[list[int]], image_processor: Any) -> list[torch.Tensor]:
    """Qwen2-VL's order of patches (time, height, width, then inside each merged square; channel, frame, row, column of a pixel) -> of each
    picture or video [T, 3, H, W]."""
    side, frames, merge = image_processor.patch_size, image_processor.temporal_patch_size, image_processor.merge_size
    found, start = [], 0
    for time, height, width in grids:
        count = time * height * width
        cut = rows[start : start + count].reshape(time, height // merge, width // merge, merge, merge, 3, frames, side, side)
        found.append(cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(time * frames, 3, height * side, width * side))
        start += count
    return found


def _before_normalising(pixels: torch.Tensor, image_processor: Any) -> torch.Tensor:
    import torch

    pixels = pixels.float()
    if getattr(image_processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(image_processor, name)).view(-1, 1, 1) for name in ("image_mean", "image_std"))
        pixels = pixels * std + mean
    return pixels / getattr(image_processor, "rescale_factor", 1 / 255) if getattr(image_processor, "do_rescale", True) else pixels
