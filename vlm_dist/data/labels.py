"""Which tokens are supervised, and with what weight. Shapes: L tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]
"""(start, end) in a text."""


def in_spans(offsets: Any, replacements: list[dict], spans: Sequence[Span]) -> Any:
    """Mask [L]: tokens that lie in a span of the rendered text, whose ends are moved past the pictures expanded before them.

    Args:
        offsets: [L, 2]: each token's place in the expanded text.
        replacements: of each picture its `span` in the rendered and its `new_span` in the expanded text.
    """
    import torch

    mask = torch.zeros(len(offsets), dtype=torch.bool)
    starts, ends = offsets[:, 0], offsets[:, 1]
    for start, end in spans:
        start, end = _after_expansion(start, replacements), _after_expansion(end, replacements)
        mask |= (starts < end) & (ends > start)
    return mask


def weights_of(offsets: Any, replacements: list[dict], spans: Sequence[Span], weights: Sequence[float]) -> Any:
    """[L] float64: what each token counts: the weight of its span, 0 outside of all."""
    import torch

    found = torch.zeros(len(offsets), dtype=torch.float64)
    for span, weight in zip(spans, weights, strict=True):
        found[in_spans(offsets, replacements, [span])] = weight
    return found


def expanded(offsets: Any, replacements: list[dict]) -> Any:
    """Mask [L]: tokens that the processor wrote for a picture, markers included."""
    import torch

    mask = torch.zeros(len(offsets), dtype=torch.bool)
    for one in replacements:
        start, end = one["new_span"]
        mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return mask


def is_per_token(tensor: Any, length: int) -> bool:
    """Whether a processor's tensor of one sample has values a token: [1, L], or [1, L, pictures, tiles] (a cross-attention mask)."""
    return tensor.ndim in (2, 4) and tuple(tensor.shape[:2]) == (1, length) and not tensor.is_floating_point()


def _after_expansion(position: int, replacements: list[dict]) -> int:
    gained = [r["new_span"][1] - r["span"][1] for r in replacements if r["span"][1] <= position]
    return position + (gained[-1] if gained else 0)
