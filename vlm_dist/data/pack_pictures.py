"""Pictures of records -> the files that go into shards: byte for byte where training reads them so, else converted, which is counted."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.config import DataConfig
from vlm_dist.data.fetch import Fetcher
from vlm_dist.data.picture_sources import name_of, read_source
from vlm_dist.data.pictures import as_rgb, decode_picture, frames_of, picture_extension, readable_formats
from vlm_dist.errors import BadSample

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = DataConfig.model_fields["max_image_pixels"].default
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class Pictures:
    """How pictures go into the shards; as they are, byte for byte, unless something is asked for or they are of another format."""

    base: Path
    """Where relative paths begin."""
    max_side: int | None = None
    """Larger pictures are made smaller until the longer side has so many pixels (Lanczos)."""
    format: str | None = None
    """jpg, png or webp: all are encoded anew."""
    quality: int = 90
    """Of what is encoded anew as jpg or webp."""
    fetcher: Fetcher | None = None
    """Of http(s) addresses; None: they are not fetched."""


def read_picture(pictures: Pictures, source: Any, notes: Counter[str]) -> tuple[str, bytes, float]:
    """(extension by what the bytes are, bytes, side as a share of what it was) of a picture's source.

    Args:
        notes: what was converted is counted here.

    Raises:
        BadSample: it cannot be read, decoded or converted.
    """
    from PIL import Image

    found, shown = read_source(source, pictures.base, pictures.fetcher), name_of(source)
    data = found if isinstance(found, bytes) else b""
    kind = picture_extension(data)
    if not isinstance(found, bytes):
        picture, what = _rgb(found, shown), "array"
    elif kind:
        picture, what = decode_picture(data, shown, MAX_PIXELS), ""
    else:
        picture, what = decode_picture(data, shown, MAX_PIXELS, readable_formats()), _format_of(data)
    limit = pictures.max_side or max(picture.size)
    is_smaller = max(picture.size) > limit
    if data and kind != "jpg" and frames_of(data) > 1:
        notes["frames"] += 1
    if kind and not is_smaller and pictures.format is None:
        return kind, data, 1.0
    before = max(picture.size)
    if is_smaller:
        picture.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    if what:
        notes[f"from {what}"] += 1
    kind, buffer = pictures.format or kind or "png", io.BytesIO()
    picture.save(buffer, FORMATS[kind], **({} if kind == "png" else {"quality": pictures.quality}))
    return kind, buffer.getvalue(), max(picture.size) / before


def scaled(objects: Any, share: float, notes: Counter[str]) -> Any:
    """Objects of a picture that became smaller: `[{"bbox": [x1, y1, x2, y2], ...}]` in its new pixels; any other form stays, and is
    counted."""
    if share == 1.0 or not objects:
        return objects
    boxes = [item.get("bbox") if isinstance(item, dict) else None for item in objects] if isinstance(objects, list) else [None]
    if not all(isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box) for box in boxes):
        notes["unscaled"] += 1
        return objects
    notes["scaled"] += 1
    return [{**item, "bbox": [round(side * share, 2) for side in item["bbox"]]} for item in objects]


def in_words(notes: Counter[str], kind: str | None) -> list[str]:
    """What was converted, dropped or seen in part, a line each."""
    lines = []
    formats = {name.removeprefix("from "): count for name, count in sorted(notes.items()) if name.startswith("from ")}
    if formats:
        each = ", ".join(f"{count:,} {name}" for name, count in formats.items())
        lines.append(f"{sum(formats.values()):,} pictures converted to {kind or 'png'}: {each}")
    if notes["frames"]:
        lines.append(f"{notes['frames']:,} pictures have several frames or pages; the first is learnt from")
    if notes["scaled"]:
        lines.append(f"the boxes of {notes['scaled']:,} pictures made smaller are scaled with them")
    if notes["unscaled"]:
        lines.append(f"the objects of {notes['unscaled']:,} pictures made smaller are as they were: no list of bbox with four numbers")
    for name, count in sorted(notes.items()):
        if name.startswith("key "):
            lines.append(f"'{name.removeprefix('key ')}' is left out of {count:,} records: it is no text, number or list of them")
    return lines


def _rgb(picture: Image, shown: str) -> Image:
    try:
        return as_rgb(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSample(f"{shown}: cannot be decoded ({(str(error).splitlines() or [type(error).__name__])[0][:120]})") from None


def _format_of(data: bytes) -> str:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return picture.format or "another format"
