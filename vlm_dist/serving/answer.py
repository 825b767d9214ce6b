"""One question about some pictures, answered by a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_dist.data.pictures import decode_picture
from vlm_dist.errors import BadSample, DataError
from vlm_dist.models.generate import generate
from vlm_dist.serving.trained import open_trained

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000


def answer(
    source: str, images: Sequence[Path], prompt: str, *, max_new_tokens: int = 128, base: bool = False, base_model: str | None = None,
    system: str | None = None, reasoning: bool = False,
) -> str:  # fmt: skip
    """The model's answer, greedily.

    Args:
        source: a run directory, an adapter folder, a checkpoint folder or a hub id.
        base: leave the adapter off.
        base_model: where the adapter's base is now, if not where its files say.
        system: the system prompt; None: that of the training, where all samples had the same; "": none.
        reasoning: let the model think first, where its chat template begins a thought.

    Raises:
        DataError: a picture cannot be read.
        ModelError: there is no such model, or its chat template takes no system prompt.
    """
    import torch

    pictures = [open_picture(path) for path in images]
    trained = open_trained(source, base=base, base_model=base_model, system=system, reasoning=reasoning)
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
    encoded = trained.encode([{"role": "user", "content": content}], pictures)
    inputs = {**encoded.inputs, "attention_mask": torch.ones_like(encoded.inputs["input_ids"])}
    return generate(trained.model, trained.processor, inputs, max_new_tokens)[0]


def open_picture(path: Path) -> Image:
    """A picture file that somebody named.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return decode_picture(path.read_bytes(), str(path), MAX_PIXELS)
    except OSError as error:
        raise DataError(f"--image: '{path}' cannot be read: {error.strerror}; give a JPEG, PNG or WebP file") from None
    except BadSample as problem:
        raise DataError(f"--image: {problem}; give a JPEG, PNG or WebP file") from None
