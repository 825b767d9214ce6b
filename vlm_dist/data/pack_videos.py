"""Videos of records -> the files that go into shards: byte for byte, or cut to their `start` and `end` where that shows the same frames."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_dist.config_model import VideoConfig
from vlm_dist.data.clips import spans_of
from vlm_dist.data.pack_pictures import MAX_PIXELS, Pictures
from vlm_dist.data.picture_sources import name_of, paths_of, read_source
from vlm_dist.data.video import WHOLE, Span, open_clip
from vlm_dist.data.video_cut import cut
from vlm_dist.data.video_decode import container_of
from vlm_dist.errors import BadSample

EXTENSIONS = ("mp4", "mkv", "webm", "avi", "mov", "m4v", "gif")
BEFORE = ("", "v_", "video", "vid")  # a number or an id: ActivityNet's and Video-ChatGPT's, MSR-VTT's, MSVD's names of files
MEMBERS = {"mov": "mp4", "matroska": "mkv", "avi": "avi", "gif": "gif"}
LOOKED_AT = 2**20  # bytes at the beginning and at the end that tell videos apart


def read_videos(
    files: Pictures, sources: list[Any], made: dict[str, Any], notes: Counter[str]
) -> tuple[list[tuple[str, bytes]], dict[str, Any]]:
    """(extension by what the bytes are, bytes) of each video, and the record with the `start` and `end` that then hold.

    Args:
        made: the canonical record.
        notes: what was cut, and what was not, is counted here.

    Raises:
        BadSample: one cannot be read, or its frames not decoded as training would by default.
    """
    if not sources:
        return [], made
    spans = spans_of(made, len(sources))
    found = [_read(files, source, span, notes) for source, span in zip(sources, spans, strict=True)]
    videos, after = [(kind, data) for kind, data, _ in found], [span for _, _, span in found]
    if after == spans:  # nothing was cut
        return videos, made
    starts, ends = [float(span.start) for span in after], [None if span.end is None else float(span.end) for span in after]
    several = len(found) > 1
    return videos, {**made, "start": starts if several else starts[0], "end": ends if several else ends[0]}


def digest_of_video(source: Any, base: Path) -> str:
    """What says that two videos are one: their length, beginning and end.

    Raises:
        BadSample: it cannot be read.
    """
    path = _path(source, base)
    if path is None:
        data = _bytes(source, Pictures(base))
        parts, size = (data[:LOOKED_AT], data[-LOOKED_AT:]), len(data)
    else:
        with path.open("rb") as file:
            size, first = path.stat().st_size, file.read(LOOKED_AT)
            file.seek(max(0, size - LOOKED_AT))
            parts = first, file.read()
    return hashlib.blake2b(b"".join((str(size).encode(), *parts)), digest_size=16).hexdigest()


def _read(files: Pictures, source: Any, span: Span, notes: Counter[str]) -> tuple[str, bytes, Span]:
    """(extension, bytes, what is meant of them)."""
    name, data = f"video {name_of(source if isinstance(source, dict) else str(source))!r}", _bytes(source, files)
    clip = open_clip(data, name, MAX_PIXELS, span)
    shown = clip.shown(VideoConfig())
    if span != WHOLE:
        part = cut(data, name, clip, shown)
        how, data, span = part or ("kept whole", data, span)
        notes[how] += 1
    kind = MEMBERS[container_of(data) or "mov"]
    return "webm" if kind == "mkv" and b"webm" in data[:64] else kind, data, span


def _bytes(source: Any, files: Pictures) -> bytes:
    path = _path(source, files.base)
    if path is not None:
        return path.read_bytes()
    if isinstance(source, int) or not isinstance(source, str | dict | bytes):
        names = f" as {source}.mp4 or video{source}.mp4" if isinstance(source, int) else ""
        raise BadSample(f"video {str(source)[:80]!r} does not lie below '{files.base}'{names}; say where the videos lie: --images FOLDER")
    found = read_source(source, files.base, files.fetcher, "video")
    if not isinstance(found, bytes):
        raise BadSample("a video is an array; expected a path or bytes")
    return found


def _path(source: Any, base: Path) -> Path | None:
    """Where a video lies whose name may lack its ending; None: it is no file there."""
    if isinstance(source, bool) or not isinstance(source, str | int):
        return None
    try:
        return next((path for name in _names(str(source)) for path in paths_of(name, base) if path.is_file()), None)
    except OSError:  # a name that is too long: base64
        return None


def _names(name: str) -> Iterator[str]:
    yield name
    folder, _, last = name.rpartition("/")
    if len(last) <= 200 and last.rpartition(".")[2].lower() not in EXTENSIONS:
        yield from (f"{folder}{'/' if folder else ''}{before}{last}.{kind}" for before in BEFORE for kind in EXTENSIONS)
