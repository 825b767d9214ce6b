"""Which records go into which part: held out by what their pictures show, not by what these are called."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_dist.data.alike import Look, groups, look_at
from vlm_dist.data.layouts import Columns, as_object, canonical
from vlm_dist.data.pack_join import picture_by_number
from vlm_dist.data.pack_pictures import MAX_PIXELS, Pictures
from vlm_dist.data.pack_videos import digest_of_video
from vlm_dist.data.picture_sources import name_of, read_source
from vlm_dist.data.pictures import decode_picture, readable_formats
from vlm_dist.errors import BadSample, DataError

SAME_VIDEO = "video "
AT_A_TIME = 256  # records in memory while their pictures are looked at


@dataclass(frozen=True)
class Parts:
    """Numbers of records."""

    numbers: dict[str, list[int]]
    """Of each part that is packed."""
    dropped: list[dict[str, Any]] = field(default_factory=list)
    """Those that say what an earlier record says, of a picture that looks alike: `record` and `reason`."""


def check_heldout(heldout: int, total: int) -> None:
    """Raises DataError where nothing would be left to train on."""
    if heldout >= total:
        raise DataError(f"data pack: --heldout={heldout}, but the source has {total} records; keep fewer apart")


def split_records(
    records: Sequence[Any], pictures: Pictures, columns: Columns | None = None, *, heldout: int = 0, limit: int | None = None,
    seed: int = 0, dedup: bool = False, tell: Callable[[str], None] | None = None,
) -> Parts:  # fmt: skip
    """About `heldout` records apart, by `seed`, with all that show one of their pictures; and of the rest `limit`.

    Args:
        dedup: pictures that look alike count as one; and of records that say the same of one only the first stays.
        tell: takes what was found, in words.

    Raises:
        DataError: there are not so many records.
    """
    check_heldout(heldout, len(records))
    rng = random.Random(seed)
    leaders = _leaders(records, pictures, columns, dedup, tell) if heldout or dedup else list(range(len(records)))
    dropped = _repeated(records, leaders, columns) if dedup else []
    gone = {problem["record"] for problem in dropped}
    together: dict[int, list[int]] = {}
    for number, leader in enumerate(leaders if heldout else []):
        if number not in gone:
            together.setdefault(leader, []).append(number)
    apart: set[int] = set()
    for group in rng.sample(list(together.values()), len(together)):
        if len(apart) >= heldout:
            break
        apart.update(group)
    train = [number for number in range(len(records)) if number not in apart and number not in gone]
    if limit is not None:
        train = sorted(rng.sample(train, min(limit, len(train))))
    return Parts({"train": train} | ({"heldout": sorted(apart)} if apart else {}), dropped)


def _leaders(
    records: Sequence[Any], pictures: Pictures, columns: Columns | None, near: bool, tell: Callable[[str], None] | None
) -> list[int]:  # fmt: skip
    from rich.progress import track

    shown: list[list[Look | str]] = []
    starts = range(0, len(records), AT_A_TIME)
    with ThreadPoolExecutor(os.cpu_count() or 1, "look") as pool:
        for start in track(starts, "looking at the pictures", transient=True, disable=not sys.stderr.isatty()):
            sources = [_sources(records[number], columns, pictures.base) for number in range(start, min(start + AT_A_TIME, len(records)))]
            shown += pool.map(lambda each: [_look(*one, pictures) for one in each], sources)
    found = groups(shown, near=near)
    by_name = sum(any(isinstance(picture, str) and not picture.startswith(SAME_VIDEO) for picture in each) for each in shown)
    sizes = Counter(leader for leader, each in zip(found, shown, strict=True) if each)
    several = [size for size in sizes.values() if size > 1]
    moving = any(isinstance(one, str) and one.startswith(SAME_VIDEO) for each in shown for one in each)
    what, kind = ("pictures or videos", "thing") if moving else ("pictures", "picture")
    if tell is not None and several:
        how = "looks alike" if near else "has the same pixels"
        tell(f"{sum(several):,} records share {len(several):,} {what} (what {how} is one {kind}): those of one go into one part")
    if tell is not None and by_name:
        tell(f"the pictures of {by_name:,} records cannot be looked at before packing (addresses, missing files); they are told by name")
    return found


def _sources(record: Any, columns: Columns | None, base: Path) -> list[tuple[Any, bool]]:
    """What a record shows, and whether it is a video."""
    try:
        if isinstance(record, BadSample):
            return []
        made = canonical(record, columns)
        videos = [(source, True) for source in made["videos"]]
        pictures = made["images"] or ([] if videos else picture_by_number(as_object(record), base))
        return [*videos, *((source, False) for source in pictures)]
    except BadSample:  # which packing will name
        return []


def _look(source: Any, is_video: bool, pictures: Pictures) -> Look | str:
    found: Any = source
    try:
        if is_video:
            return SAME_VIDEO + digest_of_video(source, pictures.base)
        found, name = read_source(source, pictures.base), name_of(source)
        return look_at(decode_picture(found, name, MAX_PIXELS, readable_formats()) if isinstance(found, bytes) else found)
    except (BadSample, OSError, ValueError):  # addresses are not fetched twice; what is broken is named by packing
        return hashlib.sha256(found if isinstance(found, bytes) else str(found).encode("utf-8", "surrogatepass")).hexdigest()


def _repeated(records: Sequence[Any], leaders: list[int], columns: Columns | None) -> list[dict[str, Any]]:
    """Records that say what an earlier one of the same picture says."""
    sizes, said, found = Counter(leaders), {}, []
    for number, leader in enumerate(leaders):
        if sizes[leader] == 1 or isinstance(records[number], BadSample):
            continue
        try:
            made = canonical(records[number], columns)
        except BadSample:
            continue
        words = json.dumps({key: made.get(key) for key in ("messages", "captions", "objects")}, sort_keys=True, default=str)
        first = said.setdefault((leader, words), number)
        if first != number:
            found.append({"record": number, "reason": f"it says what record {first} says of a picture that looks alike (--dedup)"})
    return found
