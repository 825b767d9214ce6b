"""What ran, counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Operation(NamedTuple):
    """What one launch does."""

    part: str
    """Of the model; empty where nobody asked for parts."""
    name: str
    flops: int
    """Of products."""
    moved: int
    """Bytes read and written."""


@dataclass
class Count:
    """What ran."""

    live: int = 0
    """Bytes held now."""
    peak: int = 0
    """Most bytes held at once since the last `mark`."""
    work: Counter[Operation] = field(default_factory=Counter)
    """How often each was launched."""
    waits: Counter[str] = field(default_factory=Counter)
    """How often the host waits for the device, by what it asks for."""

    @property
    def flops(self) -> int:
        return sum(one.flops * number for one, number in self.work.items())

    @property
    def moved(self) -> int:
        return sum(one.moved * number for one, number in self.work.items())

    def mark(self) -> None:
        """Begin anew: what is held stays held."""
        self.peak, self.work, self.waits = self.live, Counter(), Counter()


def nbytes_of(tensor: torch.Tensor) -> int:
    """Bytes of its elements."""
    return tensor.numel() * tensor.element_size()
