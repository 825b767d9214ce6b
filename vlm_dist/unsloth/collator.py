"""The same encoding and label mask as `vlm-dist train`, as a `data_collator` for Hugging Face's and TRL's trainers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_dist.config import DataConfig
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.data.fetch import Fetcher
from vlm_dist.data.layouts import canonical, layout_of
from vlm_dist.data.messages import check_messages, read_messages
from vlm_dist.data.picture_sources import name_of, read_source
from vlm_dist.data.pictures import (
    ORIENTATION,
    PICTURE_FORMATS,
    as_rgb,
    decode_picture,
    picture_extension,
    picture_orientation,
    readable_formats,
)  # fmt: skip
from vlm_dist.data.placing import asked_for
from vlm_dist.data.samples import Sample, objects_of
from vlm_dist.data.tally import Note, by_kind, in_words
from vlm_dist.data.unread import notes_of
from vlm_dist.errors import BadSample, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

MAX_PIXELS = DataConfig.model_fields["max_image_pixels"].default
CAPTION_PROMPT = DataConfig.model_fields["caption_prompt"].default


class VisionDataCollator:
    """Rows with `messages` (or a column that holds them) -> one padded batch; only the assistant's tokens have labels.

        collator = VisionDataCollator(model, processor)
        trainer = SFTTrainer(model=model, data_collator=collator, ...)

    Rows in the other layouts that `vlm-dist data pack` reads (question and answer, captions, ...) are taken too. A picture in a message is
    `{"type": "image", "image": X}` with X a path, an address (http(s), file:, data:), base64, bytes, a PIL picture, an array or tensor, or
    the {"bytes", "path"} of a datasets Image column; or it comes, in order, from the row's `images` / `image` column. Pictures are decoded
    as in training: upright, on white ground.

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
        self._told: set[Note] = set()
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
            self._tell(encoded[-1].notes)
        return collate(encoded, self.encoder.processor.tokenizer.pad_token_id)

    def _tell(self, notes: set[Note]) -> None:
        """What nothing reads, is changed or left out: each once."""
        for line in in_words(by_kind(dict.fromkeys(notes - self._told, 1))):
            logger.warning("row of a batch: %s; told once", line.replace(" (1 sample)", ""))
        self._told |= notes


def as_sample(row: dict[str, Any]) -> Sample:
    """A data set's row, in any layout that `vlm-dist data pack` reads, in the common form.

    Raises:
        BadSample: no text in it, its pictures do not agree with it, or it has videos.
    """
    made = _canonical(row)
    sources = made.pop("images")
    if made.pop("videos", None):
        raise BadSample("it has videos, which this collator does not take; `vlm-dist data pack` and `vlm-dist train` do")
    turns = made.pop("messages", None)
    if turns is None:
        turns = asked_for(made, "", None) if not made.get("captions") else None
    if turns is None:
        if len(sources) != 1 or not made.get("captions"):
            raise BadSample(f"no 'messages' in it; its columns are {', '.join(map(str, row))}")
        asked = [{"type": "image"}, {"type": "text", "text": CAPTION_PROMPT}]
        said = [{"type": "text", "text": made["captions"][0]}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    messages = read_messages(turns)
    check_messages(messages, len(sources))
    tools = made.pop("tools", None)
    images = [_open(source) for source in sources]
    objects = objects_of(made, messages, [image.size for image in images], lambda image: _orientation(sources[image]))
    notes = notes_of({}, {**made, "messages": turns}, row)
    return Sample("", "", messages, images, made, tools, notes, objects)


def _canonical(row: dict[str, Any]) -> dict[str, Any]:
    """The row's layout, or that of a column that holds messages."""
    own = isinstance(row.get("messages"), list)
    inside = next((value for value in row.values() if isinstance(value, dict) and isinstance(value.get("messages"), list)), None)
    if inside is not None and not own:
        return canonical({**{key: row[key] for key in ("images", "image") if key in row}, **inside})
    try:
        return canonical(row)
    except BadSample as reason:
        if layout_of(row) is not None:
            raise
        raise BadSample(f"no 'messages' in it; its columns are {', '.join(map(str, row))}; {reason}") from None


def _orientation(source: Any) -> int:
    """EXIF's, of a picture that `_open` has turned."""
    found = read_source(source, fetcher=Fetcher(allow_private=True))
    return picture_orientation(found) if isinstance(found, bytes) else int(found.getexif().get(ORIENTATION, 1))


def _open(source: Any) -> Image:
    """A picture as training sees it: of bytes by the same decoder."""
    try:
        found = read_source(source, fetcher=Fetcher(allow_private=True))
    except BadSample as reason:
        raise BadSample(str(reason) if str(reason).startswith("a picture") else f"a picture cannot be read: {reason}") from None
    if isinstance(found, bytes):
        is_usual = picture_extension(found) is not None
        return decode_picture(found, name_of(source), MAX_PIXELS, PICTURE_FORMATS if is_usual else readable_formats())
    try:
        return as_rgb(found)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSample(f"a picture cannot be read: {error}") from None
