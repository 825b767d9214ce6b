"""Micro-batches on their way to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch

from vlm_dist.models.ahead import Batch, ahead_rule, placed, stays_on_host


def made_ready(model: Any, device: torch.device, dtype: torch.dtype) -> Callable[[Batch], Batch]:
    """What the stream does with a micro-batch in the background: work out what the model would wait for, and read what is kept of its
    pictures' features; for a GPU also pixels in the number type that they are computed in, and all in memory that it can copy from by
    itself."""
    rule, features = ahead_rule(model), getattr(model, "tower_features", None)

    def ahead(batch: Batch) -> Batch:
        return rule(batch) if features is None else features.ahead(rule(batch))

    if device.type != "cuda":
        return ahead

    def ready(batch: Batch) -> Batch:
        found = ahead(batch)
        return {name: value if stays_on_host(name, found) else _pinned(name, value, dtype) for name, value in found.items()}

    return ready


def _pinned(name: str, value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return (value.to(dtype) if name.startswith("pixel_values") and value.is_floating_point() else value).pin_memory()


def on_device(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """One after another; on a GPU the next is copied, on a stream of its own, while one is computed."""
    if device.type != "cuda":
        yield from (placed(batch, device) for batch in batches)
        return
    coming = _copied(batches[0], device)
    for number in range(len(batches)):
        batch, computing = coming, torch.cuda.current_stream(device)
        computing.wait_stream(_copying(device))
        for name, value in batch.items():
            if isinstance(value, torch.Tensor) and not stays_on_host(name, batch):
                value.record_stream(computing)  # its memory is not given to the next copy before this stream has read it
        if number + 1 < len(batches):
            coming = _copied(batches[number + 1], device)
        yield batch


def _copied(batch: Batch, device: torch.device) -> Batch:
    with torch.cuda.stream(_copying(device)):
        return placed(batch, device)


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """One for all steps: memory belongs to the stream that it was made on."""
    return torch.cuda.Stream(device)
