"""Which tokens are supervised, and with what weight. Shapes: L tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]
"""(start, end) in a text."""


def span_of(offsets: Any, replacements: list[dict], spans: Sequence[Span]) -> Any:
    """[L] int64: the span of the rendered text in which each token lies, -1 where in none. Spans' ends are moved past the pictures
    expanded before them.

    Args:
        offsets: [L, 2]: each token's place in the expanded text.
        replacements: of each picture, in order, its `span` in the rendered and its `new_span` in the expanded text.
        spans: in order, none within another.
    """
    import numpy as np
    import torch

    if not spans:
        return torch.full((len(offsets),), -1)
    ends_of_pictures = [one["span"][1] for one in replacements]
    gained = [0, *(one["new_span"][1] - one["span"][1] for one in replacements)]
    moved = np.array([[place + gained[bisect_right(ends_of_pictures, place)] for place in span] for span in spans])
    begins, ends = offsets.numpy().T
    last = moved[:, 0].searchsorted(ends) - 1  # that begins before the token ends
    return torch.from_numpy(np.where((last >= 0) & (moved[:, 1][last] > begins), last, -1))


def weights_of(offsets: Any, replacements: list[dict], spans: Sequence[Span], weights: Sequence[float]) -> Any:
    """[L] float64: what each token counts: the weight of its span, 0 outside of all."""
    import torch

    return torch.tensor([*weights, 0.0], dtype=torch.float64)[span_of(offsets, replacements, spans)]


def expanded(offsets: Any, replacements: list[dict]) -> Any:
    """Mask [L]: tokens that the processor wrote for a picture, markers included."""
    return span_of(offsets, [], [tuple(one["new_span"]) for one in replacements]) >= 0


def is_per_token(tensor: Any, length: int) -> bool:
    """Whether a processor's tensor of one sample has values a token: [1, L], or [1, L, pictures, tiles] (a cross-attention mask)."""
    return tensor.ndim in (2, 4) and tuple(tensor.shape[:2]) == (1, length) and not tensor.is_floating_point()
