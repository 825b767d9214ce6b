"""The videos that a record names, and how its text places them. No file is opened."""

from __future__ import annotations

import re
from typing import Any

from vlm_dist.data.layout_values import is_present, sources_in
from vlm_dist.errors import BadSample

VIDEO_KEYS = ("videos", "video", "video_path", "video_paths", "video_file", "video_files", "video_url", "video_urls", "mp4")
ID_KEYS = ("video_name", "video_id", "vid")  # a video where the record names nothing else to look at; they stay in the record
NAMES_VIDEO = re.compile(r"\.(?:mp4|m4v|webm|mkv|mov|avi)(?:\?.*)?$", re.IGNORECASE)
MARKER, PICTURE_MARKER = "<video>", "<image>"
WHOLE = "-1"  # ShareGPT4Video's number of the caption of a whole video


def with_videos(made: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """A record's `videos` (sources, in order of appearance) beside its `images`. Videos under keys of pictures count as videos, and
    `<image>` stands for a video where the record has no picture, as LLaVA-Video writes it.

    Args:
        made: canonical but for the videos; those that typed parts of turns hold are its `videos`.
    """
    held = [key for key in VIDEO_KEYS if key in record]
    key = next((key for key in held if is_present(record[key])), None)
    named = [source for source in made["images"] if isinstance(source, str) and NAMES_VIDEO.search(source)]
    pictures = [source for source in made["images"] if not (isinstance(source, str) and NAMES_VIDEO.search(source))]
    own = made.get("videos", [])
    videos = [*(sources_in(record[key]) if key and len(own) == 0 else own), *named]
    if not videos and not pictures:
        videos = next(([record[key]] for key in ID_KEYS if isinstance(record.get(key), str | int) and is_present(record[key])), [])
    rest = {name: value for name, value in made.items() if name not in held}
    made = {**rest, "images": pictures, "videos": videos}
    return {**made, "messages": _as_videos(made["messages"], len(videos))} if "messages" in made and videos and not pictures else made


def spans_of_parts(spans: list[dict[str, Any]], record: dict[str, Any]) -> dict[str, Any]:
    """`start` and `end` that stand in typed parts of videos, as they would stand beside the turns.

    Args:
        spans: of each part.

    Raises:
        BadSample: the record has them too.
    """
    found: dict[str, Any] = {}
    for key in ("start", "end"):
        values = [span.get(key) for span in spans]
        if all(value is None for value in values):
            continue
        if is_present(record.get(key)):
            raise BadSample(f"'{key}' stands in the part of a video, and beside the turns; leave one of them out")
        found[key] = values[0] if len(values) == 1 else values
    return found


def whole_captions(value: Any) -> Any:
    """ShareGPT4Video's captions of a video and of its parts (`idx`, `content`): that of the whole; others as they are."""
    is_numbered = isinstance(value, list) and value and all(isinstance(one, dict) and {"idx", "content"} <= one.keys() for one in value)
    return [one for one in value if str(one["idx"]) == WHOLE] or value if is_numbered else value


def _as_videos(turns: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`<image>` -> `<video>`, where there are as many of them as videos, and none of these is placed."""
    asked = [turn for turn in turns if turn["role"] == "user"]
    if sum(_places(turn["content"], MARKER, "video") for turn in asked):
        return turns
    if sum(_places(turn["content"], PICTURE_MARKER, "image") for turn in asked) != count:
        return turns
    return [{**turn, "content": _turned(turn["content"])} if turn["role"] == "user" else turn for turn in turns]


def _places(content: Any, marker: str, kind: str) -> int:
    return content.count(marker) if isinstance(content, str) else sum(part["type"] == kind for part in content or ())


def _turned(content: Any) -> Any:
    if isinstance(content, str):
        return content.replace(PICTURE_MARKER, MARKER)
    return [{"type": "video"} if part["type"] == "image" else part for part in content]
