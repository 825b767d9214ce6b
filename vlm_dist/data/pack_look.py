"""A first look at records before they are packed: which layout was recognised, and one sample."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vlm_dist.data.layout_boxes import FORM_KEYS, reading
from vlm_dist.data.layout_options import numbered_answer
from vlm_dist.data.layout_values import shown
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
    ways: Counter[str | None] = Counter()
    fits: list[tuple[str, str] | None] = []
    numbered: list[tuple[int, int]] = []
    for number in numbers:
        record = records[number]
        fits.append(_fitting(record) if columns is None or columns.boxes is None else None)
        try:
            if isinstance(record, BadSample):
                raise record
            made = canonical(record, columns)
            names[_layout(record, columns)] += 1
            sample = sample or made
            numbered += [found] if (found := numbered_answer(record)) else []
            if "objects" in made and made["objects"] != as_object(record).get("objects"):
                ways.update([reading(_with_boxes(as_object(record), columns))])
        except BadSample as reason:
            reasons.append(str(reason))
            numbered += [found] if (found := numbered_answer(record)) else []
    _refuse_corners([fit for fit in fits if fit])
    if sample is None:
        which = f"none of the {len(records):,} records" + (f" ({len(numbers)} looked at)" if len(numbers) < len(records) else "")
        distinct = list(dict.fromkeys(reasons))
        raise DataError(f"data pack: {which} can be used; the first: {distinct[0]}{'; another: ' + distinct[1] if distinct[1:] else ''}")
    found = ", ".join(f"{name} ({count})" for name, count in names.most_common())
    lines = [
        f"source: {source} ({getattr(records, 'about', '')}), {len(records):,} records",
        f"layout of {len(numbers):,} looked at: {found}" + (f"; not recognised ({len(reasons)}): {_cut(reasons[0])}" if reasons else ""),
        f"sample: {_abridged(sample)}",
    ]
    if ways:
        how = " or ".join(f"{way} ({count})" for way, count in ways.most_common() if way)
        lines.append(f"boxes: read as {how}; --boxes says otherwise; packed as x1, y1, x2, y2")
    return [*lines, *_counted(numbered, columns.options_from if columns else None)]


def _counted(numbered: list[tuple[int, int]], first: int | None) -> list[str]:
    """How answers that are numbers of options are read, in words.

    Raises:
        DataError: they look as if they were counted from 1, and nobody says so.
    """
    if not numbered:
        return []
    low, beyond = min(number for number, _ in numbered), sum(number == count for number, count in numbered)
    if first is None and low == 1 and beyond:
        raise DataError(
            f"data pack: the answers are numbers of options, none of those looked at is 0, and {beyond} of {len(numbered)} are as high as "
            "there are options; --options-from 1 counts from 1, --options-from 0 leaves those out"
        )
    how = "" if first is not None else "; --options-from 1 says otherwise"
    return [f"answers: numbers of options, counted from {first or 0} ({len(numbered)} looked at, the lowest {low}){how}"]


def _cut(reason: str) -> str:
    """Without the list of all layouts, and not in the middle of a word."""
    return textwrap.shorten(reason.partition("; known are ")[0], 160, placeholder=" ...")


def _fitting(record: Any) -> tuple[str, str] | None:
    """Which reading of a record's columns of boxes fits its picture where the other does not, and a box that says so; None: both do, or
    the record says how they are meant."""
    value = record.get("objects") if isinstance(record, dict) else None
    if not isinstance(value, dict) or any(record.get(key) is not None for key in FORM_KEYS) or not isinstance(value.get("bbox"), list):
        return None
    size = [record.get(side) for side in ("width", "height")]
    boxes = [box for box in value["bbox"] if isinstance(box, list | tuple) and len(box) == 4 and all(type(n) in (int, float) for n in box)]
    inverted = next((box for box in boxes if box[2] <= box[0] or box[3] <= box[1]), None)
    if inverted is not None or not all(type(side) is int for side in size):
        return ("xywh", shown(inverted)) if inverted is not None else None
    leaves = next((box for box in boxes if box[0] + box[2] > size[0] + 1 or box[1] + box[3] > size[1] + 1), None)
    inside = all(end <= side + 1 for box in boxes for end, side in zip(box[2:], size, strict=True))
    return ("xyxy", f"{shown(list(leaves))} of a picture of {size[0]} x {size[1]}") if leaves is not None and inside else None


def _refuse_corners(fits: list[tuple[str, str]]) -> None:
    """See that boxes that would be read as COCO's are not corners."""
    corners = [box for form, box in fits if form == "xyxy"]
    if len(corners) > len(fits) / 2:
        raise DataError(
            f"data pack: the bbox {corners[0]} fits as x1, y1, x2, y2, not as COCO's x, y, width, height (so do {len(corners)} records of "
            f"those looked at, {len(fits) - len(corners)} the reverse); --boxes xyxy or --boxes xywh says which"
        )


def _with_boxes(record: dict[str, Any], columns: Columns | None) -> dict[str, Any]:
    return {**record, "bbox_format": columns.boxes} if columns and columns.boxes else record


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
