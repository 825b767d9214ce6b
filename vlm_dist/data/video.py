"""A video's bytes -> frames chosen by time: from memory, in bounded time and memory, the same on every machine.

A clip is opened by its header alone (`open_clip`: duration, size, which is what its length in tokens depends on); `Clip.shown` decodes.
Between two chosen frames is sought to the next keyframe, so an hour costs what its frames cost. The container is known by its first
bytes: FFmpeg's demuxers that would follow addresses or open further files are never tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_dist.config_model import VideoConfig
from vlm_dist.data.pictures import Size, decode_pixels, picture_size
from vlm_dist.data.video_decode import pictures_at, probe
from vlm_dist.errors import BadSample, words_of

if TYPE_CHECKING:
    import torch

LEAST = Fraction(1, 1000)  # seconds that anything lasts


class Span(NamedTuple):
    """The part of a video that is meant, in seconds."""

    start: Fraction = Fraction(0)
    end: Fraction | None = None


WHOLE = Span()


class Shown(NamedTuple):
    """Frames as a processor takes them."""

    frames: torch.Tensor
    """[T, 3, H, W] uint8, upright."""
    times: list[float]
    """Seconds of each, from the clip's beginning."""
    duration: float
    """Seconds."""


@dataclass(frozen=True)
class Clip:
    """A video of a sample, not yet decoded."""

    name: str
    duration: Fraction
    """Seconds, of the part that is meant."""
    full_size: Size
    """(width, height) of its frames, upright."""

    def times(self, config: VideoConfig) -> list[Fraction]:
        """When the frames are taken: `fps` a second, but at least `min_frames` and at most `max_frames`, evenly over the clip."""
        count = min(max(round(self.duration * Fraction(config.fps)), config.min_frames), config.max_frames)
        return [self.duration * number / count for number in range(count)]

    def size(self, config: VideoConfig) -> Size:
        """(width, height) of a frame, no larger than `max_pixels`."""
        width, height = self.full_size
        if width * height <= config.max_pixels:
            return width, height
        scale = (config.max_pixels / (width * height)) ** 0.5
        return max(1, int(width * scale)), max(1, int(height * scale))

    def shown(self, config: VideoConfig) -> Shown:
        """Decode the chosen frames.

        Raises:
            BadSample: damaged, cut short, or too much would have to be decoded.
        """
        import torch

        times, (width, height) = self.times(config), self.size(config)
        frames = torch.empty((len(times), 3, height, width), dtype=torch.uint8)
        for place, frame in enumerate(self._frames(times, (width, height))):
            frames[place] = frame
        return Shown(frames, [float(time) for time in times], float(self.duration))

    def _frames(self, times: list[Fraction], size: Size) -> Iterator[torch.Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class FileClip(Clip):
    """A file of mp4, mov, webm, mkv, avi or gif."""

    data: bytes
    start: Fraction

    def _frames(self, times: list[Fraction], size: Size) -> Iterator[torch.Tensor]:
        with _as_bad_sample(self.name):
            yield from pictures_at(self.data, [self.start + time for time in times], size)


@dataclass(frozen=True)
class PictureClip(Clip):
    """Frames that are pictures, so many a second."""

    pictures: tuple[tuple[str, bytes], ...]
    """(name, bytes) of each."""
    fps: Fraction
    start: Fraction
    max_image_pixels: int

    def _frames(self, times: list[Fraction], size: Size) -> Iterator[torch.Tensor]:
        for time in times:
            name, data = self.pictures[min(int((self.start + time) * self.fps), len(self.pictures) - 1)]
            pixels = decode_pixels(data, name, self.max_image_pixels)
            if (found := (pixels.shape[2], pixels.shape[1])) != self.full_size:
                raise BadSample(f"{name}: {found[0]} x {found[1]} pixels, the first frame {self.full_size[0]} x {self.full_size[1]}")
            yield _scaled(pixels, size)


@dataclass(frozen=True)
class PlainClip(Clip):
    """One grey for its whole time."""

    grey: int

    def _frames(self, times: list[Fraction], size: Size) -> Iterator[torch.Tensor]:
        import torch

        yield from (torch.full((3, size[1], size[0]), self.grey, dtype=torch.uint8) for _ in times)


def grey_clip(clip: Clip, grey: int = 0) -> Clip:
    """As long and as large, and shows nothing."""
    return PlainClip(clip.name, clip.duration, clip.full_size, grey)


def open_clip(data: bytes, name: str, max_image_pixels: int, span: Span = WHOLE) -> Clip:
    """A video file, by its header; where that does not say how long it lasts, by walking over its packets.

    Args:
        max_image_pixels: larger frames are refused.

    Raises:
        BadSample: no video that is known, without pictures, too large, or the span lies outside of it.
    """
    with _as_bad_sample(name):
        found = probe(data, max_image_pixels)
    start, end = _within(span, max(found.duration, LEAST), name)
    return FileClip(name, end - start, found.size, data, start)


def clip_of_pictures(pictures: Sequence[tuple[str, bytes]], fps: Any, max_image_pixels: int, span: Span = WHOLE) -> Clip:
    """Frames that lie as pictures beside the record, in order.

    Args:
        fps: how many of them are a second.

    Raises:
        BadSample: there is no such number, or the span lies outside of them.
    """
    name = pictures[0][0]
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < 10_000:
        raise BadSample(f"{name}: frames of a video, and the JSON's 'fps' is {str(fps)[:40]}; expected how many of them are a second")
    rate = Fraction(fps)
    start, end = _within(span, len(pictures) / rate, name)
    size = picture_size(pictures[0][1], name, max_image_pixels)
    return PictureClip(name, end - start, size, tuple(pictures), rate, start, max_image_pixels)


def _within(span: Span, duration: Fraction, name: str) -> tuple[Fraction, Fraction]:
    """(start, end) of what is meant; an end behind the video's own is its own."""
    if span.start >= duration:
        raise BadSample(f"{name}: 'start' is {float(span.start):g} s, and the video lasts {float(duration):.3g} s")
    return span.start, min(span.end, duration) if span.end is not None else duration


def _scaled(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """[3, H, W] at (width, height)."""
    from torchvision.transforms.v2 import functional

    width, height = size
    return pixels if tuple(pixels.shape[1:]) == (height, width) else functional.resize(pixels, [height, width], antialias=True)


@contextmanager
def _as_bad_sample(name: str) -> Iterator[None]:
    """Whatever FFmpeg dislikes of odd bytes is a fault of the sample."""
    try:
        yield
    except BadSample as reason:
        raise BadSample(f"{name}: {reason}") from None
    except MemoryError:
        raise BadSample(f"{name}: cannot be decoded (not enough memory)") from None
    except Exception as error:  # PyAV raises its own errors, and Python's: ValueError, OverflowError, ZeroDivisionError, ...
        raise BadSample(f"{name}: damaged or cut short ({words_of(error)[:120]})") from None
