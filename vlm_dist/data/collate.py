"""Encoded samples -> one padded batch. Shapes: B samples, T tokens in the longest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from vlm_dist.data.encode import IGNORED, Encoded, is_per_token


def collate(samples: Sequence[Encoded], pad_token_id: int, side: Literal["right", "left"] = "right") -> dict[str, Any]:
    """Pad to the longest: `input_ids`, `attention_mask`, `labels` [B, T], further per-token tensors [B, T], and the pictures of all
    samples behind one another along dimension 0 (those of unequal size padded at the bottom right with zeros).

    Args:
        side: where the padding goes: right to train, left to generate.
    """
    import torch

    longest = max(sample.length for sample in samples)

    def pad(row: Any, value: int) -> Any:
        missing = longest - row.shape[1]
        return torch.nn.functional.pad(row, (missing, 0) if side == "left" else (0, missing), value=value)

    batch: dict[str, Any] = {
        "input_ids": torch.cat([pad(sample.inputs["input_ids"], pad_token_id) for sample in samples]),
        "attention_mask": torch.cat([pad(torch.ones_like(sample.inputs["input_ids"]), 0) for sample in samples]),
        "labels": torch.cat([pad(sample.labels, IGNORED) for sample in samples]),
    }
    for name in dict.fromkeys(name for sample in samples for name in sample.inputs if name != "input_ids"):
        rows = [(sample.inputs[name], sample.length) for sample in samples if name in sample.inputs]
        if all(is_per_token(tensor, length) for tensor, length in rows):
            batch[name] = torch.cat([pad(tensor, 0) for tensor, _ in rows])
        else:
            batch[name] = _concatenate([tensor for tensor, _ in rows])
    return batch


def _concatenate(tensors: list[Any]) -> Any:
    """Along dimension 0, after padding the other dimensions to the largest."""
    import torch

    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].ndim)]
    padded = []
    for tensor in tensors:
        missing = [size - tensor.shape[axis] for axis, size in enumerate(sizes, start=1)]
        widths = [width for gap in reversed(missing) for width in (0, gap)]
        padded.append(torch.nn.functional.pad(tensor, widths) if any(missing) else tensor)
    return torch.cat(padded)
