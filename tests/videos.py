"""Small videos for tests: each frame is one grey, `shade(number)`, over a dark left and a light right edge."""

from __future__ import annotations

import io
import random
from fractions import Fraction

import av
import numpy as np


def shade(number: int) -> int:
    return 40 + number * 6 % 160


def picture(number: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    width, height = size
    pixels = np.full((height, width, 3), shade(number), np.uint8)
    pixels[:, : width // 8], pixels[:, -width // 8 :] = 0, 255
    return pixels


def clip(
    form: str = "mp4", codec: str = "", *, frames: int = 30, fps: float = 10, size: tuple[int, int] = (64, 48),
    times: list[float] | None = None, gop: int = 12, b_frames: int = 2, turned: int = 0, options: dict | None = None, pixels=picture,
    codec_options: dict | None = None,
) -> bytes:  # fmt: skip
    """A file. `times`: seconds of each frame, instead of `fps`; `turned`: degrees of its display matrix."""
    codec = codec or {"webm": "libvpx-vp9", "avi": "mpeg4", "gif": "gif"}.get(form, "libx264")
    kind = "rgb8" if codec == "gif" else "yuv420p"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt = *size, kind
        if codec != "gif":
            stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames if codec == "libx264" else 0
        if turned:
            stream.set_display_rotation(turned)
        base = Fraction(1, 1000) if form != "avi" else Fraction(1) / Fraction(fps).limit_denominator(1000)
        stream.codec_context.time_base = base
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(pixels(number, size), format="rgb24").reformat(format=kind)
            seconds = times[number] if times else number / fps
            frame.pts, frame.time_base = round(seconds / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def sound(form: str = "mp4") -> bytes:
    """A second of silence, and no pictures."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        for number in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def all_frames(data: bytes) -> list[tuple[Fraction, float]]:
    """(seconds from the first, mean of its middle) of every frame, decoded from the beginning: what any choice is compared with."""
    with av.open(io.BytesIO(data)) as container:
        found = []
        for frame in container.decode(video=0):
            grey = frame.to_ndarray(format="rgb24")
            found.append((frame.pts * frame.time_base, float(grey[:, grey.shape[1] // 4 : -grey.shape[1] // 4].mean())))
    return [(time - found[0][0], mean) for time, mean in found]


def damaged(data: bytes, dice: random.Random) -> bytes:
    """Cut short, changed, blanked, or with a piece less or twice, by `dice`."""
    made, place = bytearray(data), dice.randrange(len(data))
    kind = dice.choice(["cut", "change", "blank", "drop", "repeat"])
    if kind == "cut":
        del made[place:]
    elif kind == "change":
        for _ in range(dice.randrange(1, 20)):
            made[dice.randrange(len(made))] = dice.randrange(256)
    elif kind == "blank":
        made[place : place + 200] = bytes(len(made[place : place + 200]))
    elif kind == "drop":
        del made[place : place + dice.randrange(1, 300)]
    else:
        made[place:place] = made[max(0, place - 500) : place]
    return bytes(made)
