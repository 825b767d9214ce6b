"""A first look at records before they are packed: which layout was recognised, and one sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vlm_dist.data.layout_boxes import doubt
from vlm_dist.data.layouts import Columns, as_object, canonical, layout_of
from vlm_dist.data.picture_sources import name_of
from vlm_dist.errors import BadSample, DataError

LOOKED_AT = 100  # records, evenly spaced


def first_look(source: str, records: Sequence[Any], columns: Columns | None) -> list[str]:
    """A few lines in words.

    Raises:
        DataError: none of the records looked at is in a layout that is known.
    """
    numbers = sorted({number * len(records) // LOOKED_AT for number in range(LOOKED_AT)})
    names: Counter[str] = Counter()
    reasons: list[str] = []
    sample: dict[str, Any] | None = None
    has_boxes = False
    for number in numbers:
        record = records[number]
        if (columns is None or columns.boxes is None) and (why := doubt(record)) is not None:
            raise DataError(f"data pack: record {number}: {why}")
        try:
            if isinstance(record, BadSample):
                raise record
            made = canonical(record, columns)
            names[_layout(record, columns)] += 1
            sample = sample or made
            has_boxes = has_boxes or ("objects" in made and made["objects"] != record.get("objects"))
        except BadSample as reason:
            reasons.append(str(reason))
    if sample is None:
        which = f"none of the {len(records):,} records" + (f" ({len(numbers)} looked at)" if len(numbers) < len(records) else "")
        distinct = list(dict.fromkeys(reasons))
        raise DataError(f"data pack: {which} can be used; the first: {distinct[0]}{'; another: ' + distinct[1] if distinct[1:] else ''}")
    found = ", ".join(f"{name} ({count})" for name, count in names.most_common())
    lines = [
        f"source: {source} ({getattr(records, 'about', '')}), {len(records):,} records",
        f"layout of {len(numbers):,} looked at: {found}" + (f"; not recognised ({len(reasons)}): {reasons[0][:160]}" if reasons else ""),
        f"sample: {_abridged(sample)}",
    ]
    if has_boxes:
        how = columns.boxes if columns and columns.boxes else "x, y, width, height, unless a key says xyxy (--boxes says otherwise)"
        lines.append(f"boxes: read as {how}; packed as x1, y1, x2, y2")
    return lines


def _layout(record: Any, columns: Columns | None) -> str:
    if columns is not None and (columns.question or columns.answer):
        return "the columns named"
    layout = layout_of(as_object(record))
    return layout.name if layout else "the columns named"


def _abridged(sample: dict[str, Any]) -> str:
    if "messages" in sample:
        said = [f"{turn['role']}: {_short(_words(turn['content']))}" for turn in sample["messages"][:3]]
        said += [f"{len(sample['messages']) - 3} more turns"] if len(sample["messages"]) > 3 else []
    elif "captions" in sample:
        said = [f"caption: {_short(sample['captions'][0])}"] + ([f"{len(sample['captions']) - 1} more"] if sample["captions"][1:] else [])
    else:
        said = [f"objects: {_short(str(sample.get('objects')))}"]
    images = sample["images"]
    number = sample.get("image_id")
    alone = "no picture" if number is None else f"picture number {_short(str(number))}"
    pictures = [f"{len(images)} pictures: {_short(name_of(images[0]))}"] if images else [alone]
    videos = sample["videos"]
    pictures = [f"{len(videos)} videos: {_short(name_of(videos[0]))}"] + (pictures if images else []) if videos else pictures
    others = [key for key in sample if key not in ("messages", "captions", "images", "videos")]
    return " | ".join([*said, *pictures, *([f"also {', '.join(others)}"] if others else [])])[:600]


def _words(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in content)
    return content or "(nothing)"


def _short(text: str) -> str:
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return repr(text if len(text) <= 60 else text[:60] + "...")
