"""The fullest micro-batch that a run can meet."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlm_dist.config import Config
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoded, Encoder
from vlm_dist.data.labels import is_per_token
from vlm_dist.data.lengths import Length, Ruler
from vlm_dist.data.pictures import Size
from vlm_dist.data.samples import outline
from vlm_dist.data.stream import Stream
from vlm_dist.data.video import Clip, grey_clip
from vlm_dist.errors import BadSample, ConfigError, DataError

MEASURED = 200  # samples that are looked at
BLANK: tuple[Size, ...] = ((56, 56),)  # what the stream adds where a micro-batch has no picture


@dataclass(frozen=True)
class Workload:
    """One row of it; the others are like it."""

    tokens: int
    pictures: tuple[Size, ...]
    """(width, height) of each."""
    why: str
    """Where these numbers come from, in words."""
    videos: tuple[Clip, ...] = ()
    """As long and as large as those that were met."""


class Showing(NamedTuple):
    """What one sample shows."""

    sizes: tuple[Size, ...]
    """(width, height) of each picture."""
    videos: tuple[Clip, ...] = ()

    def encoded(self, encoder: Encoder) -> Encoded:
        """Blank ones, as a prompt.

        Raises:
            BadSample: of a shape that the processor does not take.
        """
        from PIL import Image

        images = [Image.new("RGB", size) for size in self.sizes]
        return encoder.encode_prompt(_question(len(images), len(self.videos)), images, videos=self.videos)


def assumed(config: Config, encoder: Encoder, size: Size, count: int) -> Workload:
    """Rows of data.max_seq_length tokens with so many pictures of a size.

    Raises:
        ConfigError: their tokens do not fit a row.
    """
    pictures = (size,) * count or BLANK
    tokens = Ruler(encoder).measure(_question(len(pictures)), list(pictures)).tokens
    if tokens > config.data.max_seq_length:
        raise ConfigError(
            f"{count} pictures of {size[0]} x {size[1]} take {tokens} tokens, more than data.max_seq_length={config.data.max_seq_length}; "
            "raise it, or name fewer or smaller ones with --pictures and --size"
        )
    return Workload(config.data.max_seq_length, pictures, f"rows of data.max_seq_length tokens, {count} pictures of {size[0]} x {size[1]}")


def measured(config: Config, encoder: Encoder, stream: Stream, pack: bool) -> Workload:
    """From the first samples of `stream`: the longest, with the pictures of the one that has most patches; with packing a full row,
    with as many such pictures as its budgets allow.

    Raises:
        DataError: none of the first samples can be used.
    """
    lengths: list[Length] = []
    shown = Showing(BLANK)
    most, problem = -1, ""
    for slot in itertools.islice(stream.measured(), min(MEASURED, stream.num_samples)):
        if slot.length is None or slot.raw is None:
            problem = problem or f"{(slot.raw or {}).get('__key__', 'the first')}: {slot.problem}"
            continue
        if slot.length.patches > most:
            found = _shown(slot.raw, config)
            try:
                found.encoded(encoder)
            except BadSample as reason:  # of a shape that the processor does not take
                problem = problem or f"{slot.raw['__key__']}: {reason}"
                continue
            most, shown = slot.length.patches, found
        lengths.append(slot.length)
    if not lengths:
        raise DataError(f"data.train: none of the first samples can be used; {problem}; `vlm-dist inspect` lists them")
    longest = max(length.tokens for length in lengths)
    if not pack:
        return Workload(longest, shown.sizes, f"the longest and the most pictures of {len(lengths)} samples", shown.videos)
    why = f"packed rows, as full as may be of the pictures of the sample with most patches of {len(lengths)}"
    filled = _filled(config, encoder, shown)
    return Workload(config.data.max_seq_length, filled.sizes, why, filled.videos)


def micro_batch(encoder: Encoder, workload: Workload, rows: int, tokens: int | None = None, multiple: int = 1) -> dict[str, Any]:
    """The tensors of so many such rows, every token of text supervised, padded to a multiple of `multiple` tokens."""
    return collate([row_of(encoder, workload, tokens)] * rows, encoder.processor.tokenizer.pad_token_id, multiple=multiple)


def row_of(encoder: Encoder, workload: Workload, tokens: int | None = None) -> Encoded:
    """One such row, of `tokens` tokens or more where its pictures take more; every token of text supervised."""
    encoded = Showing(workload.pictures, workload.videos).encoded(encoder)
    return _lengthened(encoded, max(tokens or workload.tokens, encoded.length))


def _filled(config: Config, encoder: Encoder, shown: Showing) -> Showing:
    """What a sample shows, again and again, while tokens and patches of a row last."""
    one = Ruler(encoder).measure(_question(len(shown.sizes), len(shown.videos)), list(shown.sizes), None, shown.videos)
    times = max(1, config.data.max_seq_length // one.tokens)
    if config.data.max_patches is not None:
        times = max(1, min(times, config.data.max_patches // max(1, one.patches)))
    return Showing(shown.sizes * times, shown.videos * times)


def _shown(raw: dict[str, Any], config: Config) -> Showing:
    try:
        found = outline(raw, max_image_pixels=config.data.max_image_pixels, caption_prompt=config.data.caption_prompt)
    except BadSample:
        return Showing(BLANK)
    videos = tuple(grey_clip(clip) for clip in found.videos)
    return Showing(tuple(found.sizes) or (() if videos else BLANK), videos)


def _question(pictures: int, videos: int = 0) -> list[dict[str, Any]]:
    parts = [{"type": "image"}] * pictures + [{"type": "video"}] * videos
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]


def _lengthened(encoded: Encoded, tokens: int) -> Encoded:
    """Its last token again and again, to so many; those are supervised."""
    import torch

    more = tokens - encoded.length

    def longer(tensor: Any) -> Any:
        if not is_per_token(tensor, encoded.length):
            return tensor
        return torch.cat([tensor, tensor[:, -1:].expand(-1, more, *tensor.shape[2:])], 1)

    inputs = {name: longer(tensor) for name, tensor in encoded.inputs.items()}
    labels = encoded.labels.clone()
    labels = torch.cat([labels, inputs["input_ids"][:, labels.shape[1] :]], 1)
    if not more:
        labels[:, -1] = inputs["input_ids"][:, -1]
    return Encoded(encoded.key, inputs, labels, torch.nn.functional.pad(encoded.picture, (0, more)))
