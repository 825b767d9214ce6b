"""The videos of a sample: files `KEY.mp4|webm|mkv|mov|avi|gif` (several: `KEY.0.mp4`, ...), or their frames as pictures
`KEY.f0000.jpg`, ... (several: `KEY.0.f0000.jpg`, ...) with `fps` in the JSON. `start` and `end`, in seconds, say which part is meant; of
several videos all three are lists."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from vlm_dist.data.video import Clip, Span, clip_of_pictures, open_clip
from vlm_dist.errors import BadSample

VIDEO_MEMBER = re.compile(r"(?:(\d+)\.)?(?:mp4|m4v|webm|mkv|mov|avi|gif)$")
FRAME_MEMBER = re.compile(r"(?:(\d+)\.)?f(\d+)\.(?:jpg|jpeg|png|webp)$")
VIDEO_KEYS = frozenset({"video", "videos", "start", "end", "fps", "duration", "video_id"})
"""Keys of KEY.json that say something of its videos."""


def has_videos(raw: dict[str, Any]) -> bool:
    """Whether any member is a video or a frame of one."""
    return any(is_of_video(name) for name in raw)


def is_of_video(member: str) -> bool:
    return bool(VIDEO_MEMBER.fullmatch(member) or FRAME_MEMBER.fullmatch(member))


def clips_of(raw: dict[str, Any], record: dict[str, Any], max_image_pixels: int) -> list[Clip]:
    """By number; opened by their headers, not decoded.

    Raises:
        BadSample: one cannot be opened, or `start`, `end` and `fps` do not fit them.
    """
    members = video_members(raw)
    spans = spans_of(record, len(members))
    rates = _of_each(record, "fps", len(members)) if any(isinstance(one, list) for one in members) else [None] * len(members)
    made: list[Clip] = []
    for member, span, fps in zip(members, spans, rates, strict=True):
        if isinstance(member, list):
            made.append(clip_of_pictures([(name, raw[name]) for name in member], fps, max_image_pixels, span))
        else:
            made.append(open_clip(raw[member], member, max_image_pixels, span))
    return made


def spans_of(record: dict[str, Any], count: int) -> list[Span]:
    """Which part of each of so many videos is meant.

    Raises:
        BadSample: `start` or `end` is no such number, or the end is no later.
    """
    starts, ends = (_seconds(record, key, count) for key in ("start", "end"))
    spans = [Span(start or Fraction(0), end) for start, end in zip(starts, ends, strict=True)]
    for span in spans:
        if span.end is not None and span.end <= span.start:
            raise BadSample(f"json: 'start' is {float(span.start):g} s and 'end' {float(span.end):g} s; expected a later end")
    return spans


def video_members(raw: dict[str, Any]) -> list[str | list[str]]:
    """By number: the name of a file, or those of the frames, in order.

    Raises:
        BadSample: one number stands for a file and for frames.
    """
    files = {int(match[1] or 0): name for name in raw if (match := VIDEO_MEMBER.fullmatch(name))}
    frames: dict[int, list[tuple[int, str]]] = {}
    for name in raw:
        if match := FRAME_MEMBER.fullmatch(name):
            frames.setdefault(int(match[1] or 0), []).append((int(match[2]), name))
    if both := sorted(files.keys() & frames.keys()):
        raise BadSample(f"{files[both[0]]} and {frames[both[0]][0][1]}: a video's file or its frames are expected, not both")
    found: dict[int, str | list[str]] = {**files, **{number: [name for _, name in sorted(named)] for number, named in frames.items()}}
    return [found[number] for number in sorted(found)]


def _seconds(record: dict[str, Any], key: str, count: int) -> list[Fraction | None]:
    return [None if value is None else Fraction(_number(value, key)) for value in _of_each(record, key, count)]


def _number(value: Any, key: str) -> int | float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise BadSample(f"json: '{key}' is {str(value)[:40]}; expected seconds, from 0")
    return value


def _of_each(record: dict[str, Any], key: str, count: int) -> list[Any]:
    """A key's value for each video."""
    value = record.get(key)
    if value is None or (count == 1 and not isinstance(value, list)):
        return [value] * count
    if not isinstance(value, list) or len(value) != count:
        raise BadSample(f"json: '{key}' is {str(value)[:40]}; expected a list with one for each of {count} videos")
    return value
