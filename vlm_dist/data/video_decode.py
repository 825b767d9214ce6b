"""What is asked of FFmpeg, through PyAV: how long a video lasts, and its pictures at given times."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_dist.errors import BadSample

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]
MOST_PIXELS = 10**10  # decoded for one clip: two and a half minutes of 1080p at 30 frames a second without a keyframe
MISSING, MISSING_SHARE = Fraction(1, 2), Fraction(1, 10)  # seconds, or share of all, that may lack at the end: sound is a little longer
NEAR = 8  # frames that are decoded rather than leapt over
FAR = Fraction(5)  # seconds from which on is sought where a container has no index
BEFORE = (Fraction(0), Fraction(1), Fraction(8))  # seconds before the time to seek to: indexes know when a frame is decoded, not shown
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
        duration = _duration(container, stream)
    return MovingPicture(duration if duration is not None else _walked(data), size)


def pictures_at(data: bytes, times: Sequence[Fraction], size: Size) -> Iterator[torch.Tensor]:
    """Of each time the picture that is on the screen then, [3, H, W] uint8 of `size` (width, height).

    Args:
        times: seconds from the first picture, rising.

    Raises:
        BadSample: the pictures end before, or more would have to be decoded than `MOST_PIXELS`.
        Exception: whatever FFmpeg dislikes.
    """
    with opened(data) as (container, stream):
        walk = _Walk(container, stream)
        duration = _duration(container, stream) or times[-1]
        held: Any = None
        for time in times:
            frame = walk.at(time)
            late = time - walk.end_of(frame)
            if walk.is_over and late > max(MISSING, MISSING_SHARE * duration):
                raise BadSample(f"cut short: its pictures end at {float(walk.end_of(frame)):.3g} s of {float(duration):.3g} s")
            if held is None or frame is not held[0]:
                held = frame, _pixels(frame, size)
            yield held[1]


class _Walk:
    """Frame after frame, with leaps to keyframes."""

    def __init__(self, container: Any, stream: Any):
        self.container, self.stream = container, stream
        self.base: Fraction = stream.time_base
        if container.format.name.startswith("matroska"):
            container.seek(0, stream=stream, backward=True)  # its index is read when it is first sought in
        self.keys = sorted(entry.timestamp for entry in stream.index_entries if entry.is_keyframe)
        self.left = MOST_PIXELS
        self.is_over = False
        self._frames: Iterator[Any] = iter(container.decode(stream))
        self._held: Any = None
        self._next: Any = self._decoded()
        if self._next is None:
            raise BadSample("a video without a single frame")
        self.first = self._place(self._next)

    def at(self, time: Fraction) -> Any:
        """The last frame that begins no later; the first one where none does. Times must rise."""
        target = self.first + time / self.base
        if self._worth_seeking(target):
            self._seek(target)
        while self._advance(target):
            pass
        return self._held

    def end_of(self, frame: Any) -> Fraction:
        """Seconds, from the first frame, until which it is shown."""
        return (self._place(frame) + (frame.duration or 0) - self.first) * self.base

    def _advance(self, target: Fraction) -> bool:
        """Take the next frame if it begins no later than `target`."""
        if self._next is None:
            self._next = self._decoded()
        if self._next is None or (self._held is not None and self._place(self._next) > target):
            return False
        self._held, self._next = self._next, None
        return True

    def _decoded(self) -> Any:
        frame = next(self._frames, None)
        if frame is None:
            self.is_over = True
            return None
        self.left -= frame.width * frame.height
        if self.left < 0:
            raise BadSample(
                f"more than {MOST_PIXELS / 1e9:g} billion pixels would have to be decoded for its frames: "
                "its keyframes lie too far apart; encode it anew with some (ffmpeg -g 60), or cut it"
            )
        if frame.pts is None:
            before = self._held or self._next
            frame.pts = frame.dts if frame.dts is not None else int(self._place(before) + self._step()) if before is not None else 0
        return frame

    def _place(self, frame: Any) -> Fraction:
        return Fraction(frame.pts)

    def _step(self) -> Fraction:
        return 1 / ((self.stream.average_rate or 25) * self.base)

    def _worth_seeking(self, target: Fraction) -> bool:
        """Whether a keyframe lies between here and there."""
        here = self._place(self._next if self._next is not None else self._held)
        if self.keys:
            later = bisect_right(self.keys, target)
            return later > 0 and self.keys[later - 1] > here + NEAR * self._step()
        return target - here > FAR / self.base

    def _seek(self, target: Fraction) -> None:
        shown = self._held
        for seconds in BEFORE:
            place = max(self.first, target - seconds / self.base)
            self.container.seek(int(place), stream=self.stream, backward=True)
            self._frames, self.is_over = iter(self.container.decode(self.stream)), False
            self._held = self._next = None
            self._next = self._decoded()
            if self._next is not None and self._place(self._next) <= target:
                return
        self._rewind(shown)

    def _rewind(self, frame: Any) -> None:
        """From the beginning, where a container cannot be sought in; `frame`, if any, is shown until a later one comes."""
        self.container.seek(int(self.first), stream=self.stream, backward=True)
        self._frames, self.is_over = iter(self.container.decode(self.stream)), False
        self._held, self._next = frame, None


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


def _duration(container: Any, stream: Any) -> Fraction | None:
    """As the header says; None: it does not."""
    import av

    if stream.duration and stream.duration > 0:
        return stream.duration * stream.time_base
    if container.duration and container.duration > 0:
        return Fraction(container.duration, av.time_base)
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
