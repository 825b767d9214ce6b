"""Encoded samples -> one padded batch. Shapes: B samples, T tokens in the longest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from vlm_dist.data.encoded import IGNORED, Encoded
from vlm_dist.data.labels import is_per_token

Positions = Callable[[Encoded], Any]
"""A sample's position ids [P, L]: P = 1, or 4 with M-RoPE (transformers: 0, 1, 2, ..., then time, height, width)."""

LARGE = 2**22  # bytes; numpy does nothing of the kind for smaller arrays


def collate(samples: Sequence[Encoded], pad_token_id: int, side: Literal["right", "left"] = "right", multiple: int = 1) -> dict[str, Any]:
    """Pad to the longest: `input_ids`, `attention_mask`, `labels` [B, T], further per-token tensors [B, T], and the pictures of all
    samples behind one another along dimension 0 (those of unequal size padded at the bottom right with zeros).

    Args:
        side: where the padding goes: right to train, left to generate.
        multiple: T is a multiple of it.
    """
    import torch

    longest = _up(max(sample.length for sample in samples), multiple)

    def pad(row: Any, value: int) -> Any:
        missing = longest - row.shape[1]
        after_tokens = [0, 0] * (row.ndim - 2)
        ends = (missing, 0) if side == "left" else (0, missing)
        return torch.nn.functional.pad(row, (*after_tokens, *ends), value=value)

    batch: dict[str, Any] = {
        "input_ids": torch.cat([pad(sample.inputs["input_ids"], pad_token_id) for sample in samples]),
        "attention_mask": torch.cat([pad(torch.ones_like(sample.inputs["input_ids"]), 0) for sample in samples]),
        "labels": torch.cat([pad(sample.labels, IGNORED) for sample in samples]),
    }
    # Cross-attention models (mllama) take one row of pictures a sample; all others take the pictures of the batch in one run.
    one_row_a_sample = any("cross_attention_mask" in sample.inputs for sample in samples)
    for name in dict.fromkeys(name for sample in samples for name in sample.inputs if name != "input_ids"):
        template = next(sample for sample in samples if name in sample.inputs)
        per_token = is_per_token(template.inputs[name], template.length)
        rows = []
        for sample in samples:
            if name in sample.inputs:
                rows.append(pad(sample.inputs[name], 0) if per_token else sample.inputs[name])
            elif one_row_a_sample or per_token:
                like = template.inputs[name]
                rows.append(like.new_zeros((1, longest, *like.shape[2:]) if per_token else like.shape))
        batch[name] = _concatenate(rows)
    return batch


def collate_packed(
    rows: Sequence[Sequence[Encoded]], pad_token_id: int, positions: Positions | None = None, multiple: int = 1
) -> dict[str, Any]:
    """Several samples a row, R rows, the shorter padded to the longest (and that to a multiple of `multiple`): `input_ids`, `labels`
    [R, T], `position_ids` [R, T] (or [4, R, T]), further per-token tensors [R, T], and the pictures of all samples behind one another.

    There is no `attention_mask`: transformers builds a block-diagonal one from positions that start again at 0 (with use_cache=False);
    padding is a block of its own. No label crosses from one sample to the next.
    """
    import torch

    longest = _up(max(sum(sample.length for sample in row) for row in rows), multiple)
    if positions is None:
        positions = _count_up
    position_rows, label_rows, token_rows = [], [], []
    for row in rows:
        missing = longest - sum(sample.length for sample in row)
        pieces = [positions(sample) for sample in row]
        if missing:
            pieces.append(torch.arange(missing).expand(len(pieces[0]), -1))
        position_rows.append(torch.cat(pieces, dim=1))
        labels = [torch.cat([sample.labels.new_full((1, 1), IGNORED), sample.labels[:, 1:]], dim=1) for sample in row]
        label_rows.append(torch.nn.functional.pad(torch.cat(labels, dim=1), (0, missing), value=IGNORED))
        token_rows.append(_joined([sample.inputs["input_ids"] for sample in row], missing, pad_token_id))
    stacked = torch.stack(position_rows, dim=1)
    batch: dict[str, Any] = {"input_ids": torch.cat(token_rows), "labels": torch.cat(label_rows)}
    batch["position_ids"] = stacked[0] if len(stacked) == 1 else stacked
    samples = [sample for row in rows for sample in row]
    for name in dict.fromkeys(name for sample in samples for name in sample.inputs if name != "input_ids"):
        template = next(sample for sample in samples if name in sample.inputs)
        if not is_per_token(template.inputs[name], template.length):
            batch[name] = _concatenate([sample.inputs[name] for sample in samples if name in sample.inputs])
            continue
        parts = []
        for row in rows:
            pieces = [sample.inputs.get(name, torch.zeros_like(sample.inputs["input_ids"])) for sample in row]
            parts.append(_joined(pieces, longest - sum(sample.length for sample in row), 0))
        batch[name] = torch.cat(parts)
    return batch


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _count_up(sample: Encoded) -> Any:
    import torch

    return torch.arange(sample.length).view(1, -1)


def _joined(pieces: list[Any], missing: int, value: int) -> Any:
    import torch

    return torch.nn.functional.pad(torch.cat(pieces, dim=1), (0, missing), value=value)


def _concatenate(tensors: list[Any]) -> Any:
    """Along dimension 0, after padding the other dimensions to the largest."""
    import torch

    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].ndim)]
    padded = []
    for tensor in tensors:
        missing = [size - tensor.shape[axis] for axis, size in enumerate(sizes, start=1)]
        widths = [width for gap in reversed(missing) for width in (0, gap)]
        padded.append(torch.nn.functional.pad(tensor, widths) if any(missing) else tensor)
    is_plain = all(tensor.device.type == "cpu" and tensor.dtype == padded[0].dtype and not tensor.requires_grad for tensor in padded)
    return torch.cat(padded, out=_room(sum(len(tensor) for tensor in padded), padded[0]) if is_plain else None)


def _room(length: int, like: Any) -> Any:
    """Memory for a tensor of other length, where it is large: numpy's, which asks Linux for large pages. Allocated by torch, the pictures
    of a batch lie in pages of 4 KiB that are new each time, and touching them costs more than copying the pictures does."""
    import numpy as np
    import torch

    shape = (length, *like.shape[1:])
    size = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.empty(size, np.uint8)).view(like.dtype).view(shape) if size >= LARGE else None


def with_blank(rows: list[list[Encoded]], blank: Encoded | None, pack: bool, at_the_end: bool) -> list[list[Encoded]]:
    """The rows of a micro-batch, and what the vision tower lacks in it (`Encoder.lacking`): as a row of its own, or behind the shortest
    row, where no token looks back from.

    Args:
        at_the_end: the latter: in a run with videos a picture or a video lacks in almost every micro-batch, and a row would cost one.
    """
    if blank is None:
        return rows
    if not at_the_end or not rows:
        return [*rows, [blank]]
    shortest = min(range(len(rows)), key=lambda number: sum(sample.length for sample in rows[number]))
    longer = [*rows[shortest], blank] if pack else [_one_behind_the_other(rows[shortest][0], blank)]
    return [longer if number == shortest else row for number, row in enumerate(rows)]


def _one_behind_the_other(first: Encoded, second: Encoded) -> Encoded:
    """As one sample; what one of them lacks for its tokens is 0."""
    import torch

    inputs: dict[str, Any] = {}
    for name in dict.fromkeys([*first.inputs, *second.inputs]):
        parts = [(one, one.inputs.get(name)) for one in (first, second)]
        own = next((one, tensor) for one, tensor in parts if tensor is not None)
        if is_per_token(own[1], own[0].length):
            both = [tensor if tensor is not None else torch.zeros_like(one.inputs["input_ids"]) for one, tensor in parts]
            inputs[name] = torch.cat(both, dim=1)
        else:
            inputs[name] = _concatenate([tensor for _, tensor in parts if tensor is not None])
    labels, picture = torch.cat([first.labels, second.labels], dim=1), torch.cat([first.picture, second.picture])
    return Encoded(first.key, inputs, labels, picture, first.notes)
