"""From frame to frame of a video, with leaps to keyframes. Times are in the stream's own units."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from vlm_dist.errors import BadSample

MOST_PIXELS = 10**10  # decoded for one clip: two and a half minutes of 1080p at 30 frames a second without a keyframe
NEAR = 8  # frames that are decoded rather than leapt over
FAR = Fraction(5)  # seconds from which on is sought where a container has no index
BEFORE = (Fraction(0), Fraction(1), Fraction(8))  # seconds before the time to seek to: indexes know when a frame is decoded, not shown


class Walk:
    """Frame after frame, with leaps to keyframes.

    Args:
        keys: when those that are known begin, in the stream's own units, rising.
    """

    def __init__(self, container: Any, stream: Any, keys: list[int]):
        self.container, self.stream, self.keys = container, stream, keys
        self.base: Fraction = stream.time_base
        self.is_indexed = bool(keys) and not container.format.name.startswith("matroska")  # that has an index of part of it, or of none
        self.left = MOST_PIXELS
        self.is_over = False
        self._leaps = True
        self._frames = self._decoding(leapt=False)
        self.held: Any = None
        self._next: Any = None
        self._next = self._decoded()
        if self._next is None:
            raise BadSample("a video without a single frame")
        self.first = self._place(self._next)

    def at(self, time: Fraction) -> Any:
        """The last frame that begins no later; the first one where none does. Times must rise."""
        import av

        target, shown = self.first + time / self.base, self.held
        if self._leaps and self._worth_seeking(target):
            try:
                self._seek(target)
                return self._walked_to(target)
            except av.FFmpegError:  # what cannot begin at its keyframes: a picture that is renewed bit by bit
                self._leaps = False
                self._rewind(shown)
        return self._walked_to(target)

    def end_of(self, frame: Any) -> Fraction:
        """Seconds, from the first frame, until which it is shown."""
        return (self._place(frame) + (frame.duration or 0) - self.first) * self.base

    def _walked_to(self, target: Fraction) -> Any:
        while self._advance(target):
            pass
        return self.held

    def _advance(self, target: Fraction) -> bool:
        """Take the next frame if it begins no later than `target`."""
        if self._next is None:
            self._next = self._decoded()
        if self._next is None or (self.held is not None and self._place(self._next) > target):
            return False
        self.held, self._next = self._next, None
        return True

    def _decoding(self, leapt: bool) -> Iterator[Any]:
        """All frames from here. Those that are shown before the keyframe that was leapt to, and come behind it in the file, may need what
        stands before it: they are passed over where they cannot be decoded."""
        import av

        key: int | None = None
        for packet in self.container.demux(self.stream):
            if leapt and key is None and packet.is_keyframe:
                key = packet.pts
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if key is None or packet.pts is None or packet.pts >= key:
                    raise
                continue
            yield from frames

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
            before = self.held or self._next
            frame.pts = frame.dts if frame.dts is not None else int(self._place(before) + self._step()) if before is not None else 0
        return frame

    def _place(self, frame: Any) -> Fraction:
        return Fraction(frame.pts)

    def _step(self) -> Fraction:
        return 1 / ((self.stream.average_rate or 25) * self.base)

    def _worth_seeking(self, target: Fraction) -> bool:
        """Whether a keyframe lies between here and there, or may."""
        here = self._place(self._next if self._next is not None else self.held)
        later = bisect_right(self.keys, target)
        if later > 0 and self.keys[later - 1] > here + NEAR * self._step():
            return True
        return not self.is_indexed and later == len(self.keys) and target - here > FAR / self.base

    def _seek(self, target: Fraction) -> None:
        shown, here = self.held, self._place(self._next if self._next is not None else self.held)
        for seconds in BEFORE:
            place = max(self.first, target - seconds / self.base)
            self.container.seek(int(place), stream=self.stream, backward=True)
            self._frames, self.is_over = self._decoding(leapt=True), False
            self.held = self._next = None
            self._next = self._decoded()
            if self._next is not None and self._place(self._next) <= target:
                self._leaps = self.is_indexed or self._place(self._next) > here  # else it would go back for each frame
                return
        self._rewind(shown)

    def _rewind(self, frame: Any) -> None:
        """From the beginning, where a container cannot be sought in; `frame`, if any, is shown until a later one comes."""
        self.container.seek(int(self.first), stream=self.stream, backward=True)
        self._frames, self.is_over = self._decoding(leapt=False), False
        self.held = self._next = None
        self._next = self._decoded()
        if self._next is None or self._place(self._next) > self.first:
            raise BadSample("it can neither be sought in nor read again from its beginning; encode it anew")
        self.held = frame
