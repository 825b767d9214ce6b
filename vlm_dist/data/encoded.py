"""A sample as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_dist.data.labels import is_per_token
from vlm_dist.data.tally import Note

VIDEO_PIXELS = "pixel_values_videos"
IGNORED = -100  # the label of tokens that are not supervised, as in torch.nn.functional.cross_entropy
WEIGHT_UNIT = 1_000_000  # a token's weight w is handed on as the whole number (w - 1) x 10^6, so that padding's 0 is weight 1


@dataclass
class Encoded:
    """One sample as the model takes it."""

    key: str
    inputs: dict[str, Any]
    """Tensors: `input_ids` [1, L], other per-token tensors [1, L], and what the vision tower needs (pixel_values, pixel_values_videos,
    ...). Where turns have weights other than 0 and 1 also `weights` [1, L], see `WEIGHT_UNIT`."""
    labels: Any
    """[1, L] int64."""
    picture: Any
    """[L] bool: tokens that stand for a piece of a picture or video."""
    notes: set[Note] = field(default_factory=set)
    """What was changed or left out on the way."""

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def cut(self, limit: int) -> Encoded:
        """Its first `limit` tokens."""
        inputs = {name: tensor[:, :limit] if is_per_token(tensor, self.length) else tensor for name, tensor in self.inputs.items()}
        return Encoded(self.key, inputs, self.labels[:, :limit], self.picture[:limit], self.notes | {("cut", "too long")})


def count_labels(sample: Encoded) -> float:
    """Supervised tokens after the shift by one, each as much as its weight: a whole number where all weights are 0 or 1."""
    supervised = sample.labels[:, 1:] != IGNORED
    if "weights" not in sample.inputs:
        return int(supervised.sum())
    return float((1 + sample.inputs["weights"][:, 1:][supervised].double() / WEIGHT_UNIT).sum())


def lacking(samples: Sequence[Encoded], kinds: Sequence[str]) -> list[str]:
    """Which of these tensors none of the samples has."""
    return [kind for kind in kinds if not any(kind in sample.inputs for sample in samples)]


def count_patches(inputs: dict[str, Any]) -> int:
    """Pieces that the vision tower computes for a processor's tensors, of pictures and videos: rows of patches where the processor cuts
    them (Qwen, Gemma 4), else squares of 14 x 14 pixels."""
    return sum(_patches(inputs[name]) for name in ("pixel_values", VIDEO_PIXELS) if name in inputs)


def _patches(pixels: Any) -> int:
    return pixels.numel() // pixels.shape[-1] if pixels.ndim <= 3 else pixels.numel() // (pixels.shape[-3] * 14 * 14)
