"""A part of a video, cut out: without encoding anew, from the keyframe before it begins, or else encoded without loss. Only where it is
smaller and shows the same frames."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any, NamedTuple

from vlm_dist.config_model import VideoConfig
from vlm_dist.data.video import Clip, FileClip, Shown, Span, open_clip
from vlm_dist.data.video_decode import container_of, opened

FORMS = {"mov": "mp4", "matroska": "matroska"}
NEARLY = Fraction(1, 10**6)  # seconds
LITTLE = 0.5  # of a video; a cut that leaves more is compared with the part encoded anew
WITHOUT_LOSS = {"qp": "0", "preset": "veryfast"}
PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuv444p")  # that H.264 keeps as they are


class Part(NamedTuple):
    """Of a video."""

    how: str
    """cut, or encoded anew."""
    data: bytes
    span: Span
    """What is meant of it."""


def cut(data: bytes, name: str, clip: Clip, shown: Shown) -> Part | None:
    """The packets that a clip's frames need, or its frames encoded anew, and where the clip lies in them.

    Args:
        clip, shown: what is meant, and its frames by the default `data.video`: those of the part are compared with them.

    Returns:
        None: neither is smaller and shows the same frames; then the whole video stands for it.
    """
    if not isinstance(clip, FileClip):
        return None
    found: list[Part] = []
    for how, make in (("cut", _packets), ("encoded anew", _encoded)):
        if found and len(found[0].data) < LITTLE * len(data):
            break
        try:
            made, offset = make(data, clip.start, clip.start + clip.duration)
            span = Span(Fraction(float(clip.start - offset)), Fraction(float(clip.start - offset + clip.duration)))
            if len(made) >= len(data):
                continue
            again = open_clip(made, name, 2**62, span)
            same = abs(again.duration - clip.duration) < NEARLY and again.shown(VideoConfig()).frames.equal(shown.frames)
        except Exception:  # whatever FFmpeg does not read or write: PyAV's own errors, and Python's
            continue
        found += [Part(how, made, span)] if same else []
    return min(found, key=lambda part: len(part.data), default=None)


def _encoded(data: bytes, start: Fraction, end: Fraction) -> tuple[bytes, Fraction]:
    """(an MP4 file of H.264 without loss with the frames from the one on the screen at `start` to the first behind `end`, seconds at which
    it begins); seconds from the first picture.

    Raises:
        ValueError: pixels that would not stay what they are, or a file that is no smaller.
    """
    import av

    buffer, begin = io.BytesIO(), 0
    with opened(data) as (source, stream), av.open(buffer, "w", format="mp4") as target:
        first = next(source.decode(stream)).pts
        source.seek(first + int(start / stream.time_base), stream=stream, backward=True)
        shown: Any = None
        written: Any = None
        for frame in source.decode(stream):
            late = (frame.pts - first) * stream.time_base
            if written is None and late > start and shown is not None:
                written, begin = _h264(target, stream, shown), shown.pts
                target.mux(written.encode(_from(shown, begin)))
            if written is not None:
                target.mux(written.encode(_from(frame, begin)))
            shown = frame
            if buffer.tell() >= len(data):
                raise ValueError("no smaller than the whole")
            if late > end:
                break
        if written is None:  # the last frame alone
            written, begin = _h264(target, stream, shown), shown.pts
            target.mux(written.encode(_from(shown, begin)))
        target.mux(written.encode())
    return buffer.getvalue(), (begin - first) * stream.time_base


def _from(frame: Any, begin: int) -> Any:
    frame.pts, frame.pict_type = frame.pts - begin, 0
    return frame


def _h264(target: Any, stream: Any, frame: Any) -> Any:
    if frame.format.name not in PIXELS:
        raise ValueError(f"{frame.format.name} does not stay what it is")
    made = target.add_stream("libx264", rate=stream.average_rate or 25, options=WITHOUT_LOSS)
    made.width, made.height, made.pix_fmt = frame.width, frame.height, frame.format.name
    made.codec_context.time_base, made.codec_context.max_b_frames = stream.time_base, 0
    made.codec_context.colorspace, made.codec_context.color_range = frame.colorspace, frame.color_range
    if frame.rotation:
        made.set_display_rotation(frame.rotation)
    return made


def _packets(data: bytes, start: Fraction, end: Fraction) -> tuple[bytes, Fraction]:
    """(a file with the packets from the keyframe before `start` to `end`, seconds at which it begins); seconds from the first picture.

    Raises:
        ValueError: a form that is not written.
    """
    import av

    if container_of(data) not in FORMS:
        raise ValueError(f"{container_of(data)} is not cut")

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
