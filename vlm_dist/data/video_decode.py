"""What is asked of FFmpeg, through PyAV: how long a video lasts, and its pictures at given times."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_dist.data.video_walk import Walk
from vlm_dist.errors import BadSample

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]
MISSING, MISSING_SHARE = Fraction(1, 2), Fraction(1, 10)  # seconds, or share of all, that may lack at the end: sound is a little longer
UNSPECIFIED = 2  # FFmpeg's number of a colour space that nothing names
HD = 720  # lines from which on an unnamed colour space is BT.709
BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # what mp4 and mov files begin with

GIF_END = b";"  # the last byte; some writers fill up behind it


class MovingPicture(NamedTuple):
    """What a header says."""

    duration: Fraction
    """Seconds."""
    size: Size
    """(width, height), upright."""


def container_of(data: bytes) -> str | None:
    """FFmpeg's name of the demuxer, by the first bytes; None: no video that is taken."""
    if data[4:8] in BOXES:
        return "mov"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "avi"
    if data.startswith(b"GIF8"):
        if GIF_END not in data[-16:]:
            raise BadSample("cut short: no end")
        return "gif"
    return None


def probe(data: bytes, max_pixels: int) -> MovingPicture:
    """Length and size; the first picture is decoded to know which way is up.

    Args:
        max_pixels: larger ones are refused before that.

    Raises:
        BadSample: it has no pictures.
        Exception: whatever FFmpeg dislikes.
    """
    with opened(data) as (container, stream):
        size = stream.codec_context.width, stream.codec_context.height
        if size[0] * size[1] > max_pixels:
            raise BadSample(f"frames of {size[0]} x {size[1]} pixels, more than data.max_image_pixels={max_pixels:,}")
        first = next(container.decode(stream), None)
        if first is None:
            raise BadSample("a video without a single frame")
        size = (first.height, first.width) if first.rotation % 180 else (first.width, first.height)
        duration = _duration(container, stream, first.pts or 0)
    return MovingPicture(duration if duration is not None else _walked(data), size)


def pictures_at(data: bytes, times: Sequence[Fraction], size: Size) -> Iterator[torch.Tensor]:
    """Of each time the picture that is on the screen then, [3, H, W] uint8 of `size` (width, height).

    Args:
        times: seconds from the first picture, rising.

    Raises:
        BadSample: the pictures end before, or more would have to be decoded than `video_walk.MOST_PIXELS`.
        Exception: whatever FFmpeg dislikes.
    """
    with opened(data) as (container, stream):
        walk = Walk(container, stream, _keyframes(data, stream))
        duration = _duration(container, stream, walk.first) or times[-1]
        held: Any = None
        for time in times:
            frame = walk.at(time)
            late = time - walk.end_of(frame)
            if walk.is_over and late > max(MISSING, MISSING_SHARE * duration):
                raise BadSample(f"cut short: its pictures end at {float(walk.end_of(frame)):.3g} s of {float(duration):.3g} s")
            if held is None or frame is not held[0]:
                held = frame, _pixels(frame, size)
            yield held[1]


def _keyframes(data: bytes, stream: Any) -> list[int]:
    """When keyframes begin, as far as the container's index is known. Matroska's is read as one seeks, which is done beside the walk:
    such a seek does not always come back to the beginning."""
    import av

    index = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
    if stream.container.format.name.startswith("matroska"):
        with opened(data) as (container, beside), suppress(av.FFmpegError):
            container.seek(0, stream=beside, backward=True)
            index = [entry.timestamp for entry in beside.index_entries if entry.is_keyframe]
    return sorted(index)


@contextmanager
def opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    import av

    kind = container_of(data)
    if kind is None:
        raise BadSample("no video that is read here; expected mp4, mov, webm, mkv, avi or gif")
    with av.open(io.BytesIO(data), format=kind, metadata_errors="ignore") as container:
        covers = int(av.stream.Disposition.attached_pic)
        stream = next((one for one in container.streams.video if not int(one.disposition) & covers), None)
        if stream is None:
            raise BadSample("it has no pictures" + (", only sound" if container.streams.audio else ""))
        if stream.time_base is None or stream.codec_context is None:
            raise BadSample("its pictures are in a form that FFmpeg does not know")
        stream.codec_context.thread_count = 1  # the stream's own threads decode several videos at a time
        stream.codec_context.options = {"err_detect": "explode"}  # else damage is painted over
        yield container, stream


def _duration(container: Any, stream: Any, first: int | Fraction) -> Fraction | None:
    """As the header says, from the first frame on, which is at `first`; None: it does not."""
    import av

    if stream.duration and stream.duration > 0:
        return stream.duration * stream.time_base
    if container.duration and container.duration > 0:
        begin = first * stream.time_base if container.format.name.startswith("matroska") else 0  # its header says when it ends
        return max(Fraction(container.duration, av.time_base) - begin, Fraction(0)) or None
    return None


def _walked(data: bytes) -> Fraction:
    """By its packets, without decoding."""
    with opened(data) as (container, stream):
        last = Fraction(0)
        first = None
        for packet in container.demux(stream):
            at = packet.pts if packet.pts is not None else packet.dts
            if at is not None:
                first = at if first is None else min(first, at)
                last = max(last, Fraction(at + (packet.duration or 0)))
        return (last - (first or 0)) * stream.time_base


def _pixels(frame: Any, size: Size) -> torch.Tensor:
    """RGB, upright, transparent parts on white."""
    import numpy as np
    import torch
    from av.video.reformatter import Interpolation

    if frame.is_corrupt:
        raise BadSample(f"damaged at {float(frame.time or 0):.3g} s")
    quarter = frame.rotation // 90 % 4
    width, height = (size[1], size[0]) if quarter % 2 else size
    clear = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    how = int(Interpolation.AREA if (width, height) != (frame.width, frame.height) else Interpolation.BICUBIC)
    exact = int(Interpolation.ACCURATE_RND) | int(Interpolation.BITEXACT) | int(Interpolation.FULL_CHR_H_INT)
    space = _colour_space(frame)
    form = "rgba" if clear else "gbrp"  # in planes: a third of the time of rgb24, and the same numbers
    pixels = frame.to_ndarray(width=width, height=height, format=form, interpolation=how | exact, src_colorspace=space, threads=1)
    if clear:
        alpha = pixels[..., 3:].astype(np.uint16)
        pixels = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(np.rot90(pixels, quarter).transpose(2, 0, 1)))


def _colour_space(frame: Any) -> Any:
    from av.video.reformatter import Colorspace

    known = {1: Colorspace.ITU709, 4: Colorspace.FCC, 7: Colorspace.SMPTE240M, 9: Colorspace.BT2020, 10: Colorspace.BT2020}
    if frame.colorspace == UNSPECIFIED:
        return Colorspace.ITU709 if frame.height >= HD else Colorspace.ITU601
    return known.get(frame.colorspace, Colorspace.ITU601)
