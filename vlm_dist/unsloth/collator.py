"""The same encoding and label mask as `vlm-dist train`, as a `data_collator` for Hugging Face's and TRL's trainers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.data.messages import check_messages, read_messages
from vlm_dist.data.samples import Sample
from vlm_dist.data.storage import Storage
from vlm_dist.errors import BadSample, DataError


class VisionDataCollator:
    """Rows with `messages` (or a column that holds them) -> one padded batch; only the assistant's tokens have labels.

        collator = VisionDataCollator(model, processor)
        trainer = SFTTrainer(model=model, data_collator=collator, ...)

    A picture in a message is `{"type": "image", "image": X}` with X a path, an http(s) address, bytes, a PIL picture, or the
    {"bytes", "path"} of a datasets Image column; or it comes, in order, from the row's `images` / `image` column.

    Args:
        model: not used; taken because the collators that users know take it.
        processor: the model's processor.
        max_seq_length: longest row in tokens; None: `processor.tokenizer.model_max_length`.
        on_too_long: "refuse" (an error that names the row) or "truncate" (text at the end is cut, picture tokens never).

    Raises:
        DataError: a row cannot be used; says which, and why.
    """

    def __init__(self, model: Any, processor: Any, max_seq_length: int | None = None, on_too_long: str = "truncate"):
        if on_too_long not in ("refuse", "truncate"):
            raise DataError(f"on_too_long={on_too_long!r}: expected 'refuse' or 'truncate'")
        longest = max_seq_length or processor.tokenizer.model_max_length
        self.encoder = Encoder(processor, longest, on_too_long)  # pyright: ignore[reportArgumentType]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Encode and pad rows.

        Returns:
            `input_ids`, `attention_mask` and `labels` ([rows, longest row] int64; -100: not learnt from), and what the model takes
            beside them, such as `pixel_values`, in the form of its processor.

        Raises:
            DataError: a row cannot be used; says which, and why.
        """
        encoded = []
        for number, row in enumerate(rows):
            try:
                encoded.append(self.encoder.encode(as_sample(row)))
            except BadSample as reason:
                raise DataError(f"row {number} of the batch: {reason}") from None
        return collate(encoded, self.encoder.processor.tokenizer.pad_token_id)


def as_sample(row: dict[str, Any]) -> Sample:
    """A data set's row in the common form.

    Raises:
        BadSample: no messages in it, or its pictures do not agree with them.
    """
    turns = _find_messages(row)
    parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
    sources = [part["image"] for part in parts if part.get("type") == "image" and part.get("image") is not None]
    if not sources:
        column = row.get("images") or row.get("image") or []
        sources = list(column) if isinstance(column, list | tuple) else [column]
    messages = read_messages(turns)
    check_messages(messages, len(sources))
    return Sample("", "", messages, [_open(source) for source in sources])


def _find_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    for value in (row, *row.values()):
        if isinstance(value, dict) and isinstance(value.get("messages"), list):
            return value["messages"]
    raise BadSample(f"no 'messages' in it; its columns are {', '.join(row)}")


def _open(source: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        source = _fetch(source)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(source if isinstance(source, io.BytesIO) else Path(source))
        return picture.convert("RGB")
    except (OSError, TypeError, UnidentifiedImageError) as error:
        raise BadSample(f"a picture cannot be read: {error}") from None


def _fetch(address: str) -> bytes:
    try:
        return Storage().read_whole(address)
    except DataError as error:
        raise BadSample(f"a picture cannot be fetched: {error}") from None
