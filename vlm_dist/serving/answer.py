"""One question about some pictures, answered by a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_dist.data.encode import Encoder
from vlm_dist.data.pictures import decode_picture
from vlm_dist.errors import BadSample, DataError
from vlm_dist.models.generate import generate
from vlm_dist.models.trained import load_trained

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000


def answer(source: str, images: Sequence[Path], prompt: str, *, max_new_tokens: int = 128, base: bool = False) -> str:
    """The model's answer, greedily.

    Args:
        source: a run directory, a checkpoint folder or a hub id.
        base: leave the run's adapter off.

    Raises:
        DataError: a picture cannot be read.
        ModelError: there is no such model.
    """
    import torch

    pictures = [open_picture(path) for path in images]
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model, processor = load_trained(source, device, base=base)
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
    encoded = Encoder(processor, max_seq_length=2**31).encode_prompt([{"role": "user", "content": content}], pictures)
    inputs = {**encoded.inputs, "attention_mask": torch.ones_like(encoded.inputs["input_ids"])}
    return generate(model, processor, inputs, max_new_tokens)[0]


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
