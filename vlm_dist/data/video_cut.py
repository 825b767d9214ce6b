"""A part of a video, cut out without encoding anew: from the keyframe before it begins. Only where it shows the same frames."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_dist.config_model import VideoConfig
from vlm_dist.data.video import Clip, FileClip, Shown, Span, open_clip
from vlm_dist.data.video_decode import container_of, opened
from vlm_dist.errors import BadSample

if TYPE_CHECKING:
    pass

FORMS = {"mov": "mp4", "matroska": "matroska"}
NEARLY = Fraction(1, 10**6)  # seconds


class Part(NamedTuple):
    """Of a video."""

    data: bytes
    span: Span
    """What is meant of it."""


def cut(data: bytes, name: str, clip: Clip, shown: Shown) -> Part | None:
    """The packets that a clip's frames need, and where the clip lies in them.

    Args:
        clip, shown: what is meant, and its frames by the default `data.video`: those of the cut are compared with them.

    Returns:
        None: it would be no smaller, or show other frames; then the whole video stands for it.
    """
    if container_of(data) not in FORMS or not isinstance(clip, FileClip):
        return None
    try:
        made, offset = _packets(data, clip.start, clip.start + clip.duration)
        span = Span(Fraction(float(clip.start - offset)), Fraction(float(clip.start - offset + clip.duration)))
        if len(made) >= len(data):
            return None
        again = open_clip(made, name, 2**62, span)
        same = abs(again.duration - clip.duration) < NEARLY and again.shown(VideoConfig()).frames.equal(shown.frames)
    except (BadSample, OSError, ValueError, OverflowError, StopIteration):  # what FFmpeg does not write, and PyAV's errors
        return None
    return Part(made, span) if same else None


def _packets(data: bytes, start: Fraction, end: Fraction) -> tuple[bytes, Fraction]:
    """(a file with the packets from the keyframe before `start` to `end`, seconds at which it begins); seconds from the first picture."""
    import av

    buffer = io.BytesIO()
    with opened(data) as (source, stream), av.open(buffer, "w", format=FORMS[container_of(data) or ""]) as target:
        packets = [packet for packet in source.demux(stream) if packet.size]
        _number(packets)
        base, first = stream.time_base, min(packet.pts for packet in packets)
        places = [(packet.pts - first) * base for packet in packets]
        begin = max(number for number, packet in enumerate(packets) if packet.is_keyframe and places[number] <= start)
        written: Any = target.add_stream_from_template(stream)
        for number in range(begin, len(packets)):
            packet = packets[number]
            if (packet.dts - first) * base > end:
                break
            if places[number] >= places[begin]:  # else it needs pictures before the keyframe
                packet.stream = written
                target.mux(packet)
    return buffer.getvalue(), places[begin]


def _number(packets: list[Any]) -> None:
    """Give those a place in the order of decoding that have none: in Matroska the first ones.

    Raises:
        ValueError: a later one has none, or one is never shown.
    """
    known = next(number for number, packet in enumerate(packets) if packet.dts is not None)
    for number in range(known):
        packets[number].dts = packets[known].dts - known + number
    if any(packet.pts is None or packet.dts is None for packet in packets):
        raise ValueError("a packet without a time")
