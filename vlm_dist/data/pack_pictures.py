"""Pictures of records -> the files that go into shards: byte for byte where training reads them so, else converted, which is counted."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.config import DataConfig
from vlm_dist.data import tally
from vlm_dist.data.fetch import Fetcher
from vlm_dist.data.picture_sources import name_of, read_source
from vlm_dist.data.pictures import HEIC, NEEDS_HEIF, Size, as_rgb, decode_picture, frames_of, picture_extension, readable_formats
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


def read_picture(pictures: Pictures, source: Any, notes: Counter[str]) -> tuple[str, bytes, Size | None]:
    """(extension by what the bytes are, bytes, its size before where it was made smaller) of a picture's source.

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
        return kind, data, None
    before = picture.size
    if is_smaller:
        picture.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    if what:
        notes[f"from {what}"] += 1
    kind, buffer = pictures.format or kind or "png", io.BytesIO()
    picture.save(buffer, FORMATS[kind], **({} if kind == "png" else {"quality": pictures.quality}))
    return kind, buffer.getvalue(), before if is_smaller else None


def with_sizes(made: dict[str, Any], before: list[Size | None], notes: Counter[str]) -> dict[str, Any]:
    """A record with objects whose pictures were made smaller: their numbers stay, and `objects_size`, of several pictures each object's
    `size`, says what they refer to."""
    if not made.get("objects") or not any(before):
        return made
    if "objects_size" in made or len(before) == 1:
        notes["sized"] += 1
        return {"objects_size": list(before[0] or ()), **made}
    objects = made["objects"]
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        raise BadSample("'objects' of several pictures that are made smaller; expected a list of {bbox | point | polygon, label, image}")
    numbers = [one.get("image", 0) for one in objects]
    sizes = [before[number] if isinstance(number, int) and 0 <= number < len(before) else None for number in numbers]
    notes["sized"] += 1
    return {**made, "objects": [one if size is None else {"size": list(size), **one} for one, size in zip(objects, sizes, strict=True)]}


def in_words(notes: Counter[str], kind: str | None) -> list[str]:
    """What was converted, dropped or seen in part, a line each."""
    lines = []
    formats = {name.removeprefix("from "): count for name, count in sorted(notes.items()) if name.startswith("from ")}
    if formats:
        each = ", ".join(f"{count:,} {name}" for name, count in formats.items())
        lines.append(f"{sum(formats.values()):,} pictures converted to {kind or 'png'}: {each}")
    if notes["frames"]:
        lines.append(f"{notes['frames']:,} pictures have several frames or pages; the first is learnt from")
    if notes["cut"]:
        lines.append(
            f"{notes['cut']:,} videos are cut to their 'start' and 'end' at keyframes, without encoding anew: the frames are the same"
        )
    if notes["encoded anew"]:
        lines.append(
            f"{notes['encoded anew']:,} videos are cut to their 'start' and 'end' between keyframes, and so encoded anew (H.264 without "
            "loss): the frames are the same"
        )
    if notes["kept whole"]:
        why = "where a cut would save nothing or show other frames"
        lines.append(f"{notes['kept whole']:,} videos with 'start' or 'end' are kept whole, and both stay in the JSON: {why}")
    if notes["sized"]:
        lines.append(f"{notes['sized']:,} records whose pictures were made smaller keep the numbers of their objects, with the size before")
    if notes["crowds"]:
        lines.append(f"{notes['crowds']:,} boxes around crowds (iscrowd) are left out")
    if notes["heif"]:
        lines.append(f"{notes['heif']:,} records have {HEIC} that cannot be read here: {NEEDS_HEIF}")
    if notes["no picture"]:
        lines.append(f"{notes['no picture']:,} records have no picture; if they name one under a key of their own, give it: --image KEY")
    splits = {name.removeprefix("split "): count for name, count in sorted(notes.items()) if name.startswith("split ")}
    if len(splits) > 1:
        each = ", ".join(f"{name} ({count:,})" for name, count in splits.items())
        lines.append(f"records of several splits are packed together: {each}; --split NAME packs one of them (NAME,NAME several)")
    unread = {
        kind: {name.removeprefix(f"unread {kind}: "): count for name, count in notes.most_common() if name.startswith(f"unread {kind}: ")}
        for kind in tally.KINDS
    }
    lines += tally.in_words({kind: names for kind, names in unread.items() if names})
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
