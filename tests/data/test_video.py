"""Frames chosen by time are those that a full decode shows then, in every container; damage and odd files end in a reason."""

from __future__ import annotations

import io
import random
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from tests.videos import all_frames, clip, damaged, picture, shade, sound
from vlm_dist.config_model import VideoConfig
from vlm_dist.data import video_walk
from vlm_dist.data.video import Span, clip_of_pictures, open_clip
from vlm_dist.errors import BadSample

MANY = 10**8
UNEVEN = [0, 0.1, 0.2, 0.9, 1.0, 1.05, 2.4, 2.5, 2.6, 2.9]
FILES = {
    "mp4": {}, "mov": {"form": "mov"}, "matroska": {"form": "matroska"}, "webm": {"form": "webm"}, "avi": {"form": "avi"},
    "gif": {"form": "gif"}, "fragments": {"options": {"movflags": "frag_keyframe+empty_moov"}}, "one keyframe": {"gop": 1000},
    "keyframes only": {"gop": 1, "b_frames": 0}, "b-frames": {"b_frames": 4}, "live": {"form": "matroska", "options": {"live": "1"}},
    "uneven": {"times": UNEVEN, "frames": 10, "b_frames": 0}, "uneven webm": {"form": "webm", "times": UNEVEN, "frames": 10},
    "short": {"frames": 1}, "odd size": {"size": (66, 34)}, "29.97": {"fps": 30000 / 1001, "frames": 90},
}  # fmt: skip


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def shades(frames: torch.Tensor) -> list[float]:
    width = frames.shape[3]
    return [float(frame[:, :, width // 4 : -width // 4].float().mean()) for frame in frames]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fps", [1, 4, 100])
def test_frames_are_those_on_the_screen(name, fps):
    data = clip(**FILES[name])
    shown = open_clip(data, "a.mp4", MANY).shown(VideoConfig(fps=fps, max_frames=40))
    every = all_frames(data)
    expected = [[mean for time, mean in every if float(time) <= moment + 1e-9][-1] for moment in shown.times]
    assert len(shown.frames) == len(shown.times) and shown.frames.dtype == torch.uint8
    assert shades(shown.frames) == pytest.approx(expected, abs=2.5)  # the converters round in their own ways


def test_how_many_frames():
    found = open_clip(clip(frames=50), "a.mp4", MANY)  # five seconds
    assert found.duration == 5
    assert [float(time) for time in found.times(VideoConfig(fps=2))] == [number / 2 for number in range(10)]
    assert [float(time) for time in found.times(VideoConfig(fps=2, max_frames=5))] == [0, 1, 2, 3, 4]  # evenly over the clip
    assert len(found.times(VideoConfig(fps=0.2))) == 4 and len(found.times(VideoConfig(fps=0.2, min_frames=1))) == 1
    with pytest.raises(ValueError, match="min_frames=9 is more than max_frames=8"):
        VideoConfig(min_frames=9, max_frames=8)


def test_a_part_of_it():
    data, config = clip(frames=100, gop=25), VideoConfig(fps=5)
    part = open_clip(data, "a.mp4", MANY, Span(Fraction(4), Fraction(6)))
    whole = open_clip(data, "a.mp4", MANY).shown(config)
    shown = part.shown(config)
    assert part.duration == 2 and shown.times[0] == 0 and torch.equal(shown.frames, whole.frames[20:30])
    assert open_clip(data, "a.mp4", MANY, Span(Fraction(9), Fraction(99))).duration == 1
    with pytest.raises(BadSample, match=r"a.mp4: 'start' is 10 s, and the video lasts 10 s"):
        open_clip(data, "a.mp4", MANY, Span(Fraction(10)))


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_upright(degrees):
    """The dark edge lies left as it is stored; turned counterclockwise by 90 degrees it lies at the bottom."""
    found = open_clip(clip(turned=degrees), "a.mp4", MANY)
    frame = found.shown(VideoConfig()).frames[0].float().mean(0)
    assert found.full_size == ((48, 64) if degrees != 180 else (64, 48))
    edges = {"left": frame[:, :4].mean(), "right": frame[:, -4:].mean(), "top": frame[:4].mean(), "bottom": frame[-4:].mean()}
    assert min(edges, key=edges.get) == {90: "bottom", -90: "top", 180: "right"}[degrees]


def test_smaller_while_decoding():
    found, config = open_clip(clip(size=(320, 240)), "a.mp4", MANY), VideoConfig(max_pixels=10_000)
    frames = found.shown(config).frames
    assert frames.shape[2:] == (86, 115) and found.size(config) == (115, 86)
    assert shades(frames) == pytest.approx([shade(number) for number in range(0, 30, 5)], abs=3)
    with pytest.raises(BadSample, match=r"a.mp4: frames of 320 x 240 pixels, more than data.max_image_pixels=1,000"):
        open_clip(clip(size=(320, 240)), "a.mp4", 1000)


@pytest.mark.parametrize("size", [(64, 48), (1280, 720)])
def test_colours(size):
    def red(number, size):
        return np.broadcast_to(np.array([200, 30, 30], np.uint8), (size[1], size[0], 3)).copy()

    frame = open_clip(clip(size=size, frames=3, pixels=red, b_frames=0), "a.mp4", MANY).shown(VideoConfig()).frames[0]
    assert abs(frame.float().mean((1, 2)) - torch.tensor([200.0, 30, 30])).max() < (3 if size[1] < 720 else 40)  # written as BT.601


def test_transparent_parts_are_white(tmp_path):
    frames = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)) for _ in range(2)]
    frames[1].putpixel((0, 0), (255, 0, 0, 255))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=500, disposal=2)
    shown = open_clip((tmp_path / "a.gif").read_bytes(), "gif", MANY).shown(VideoConfig())
    assert shown.duration == 1 and (shown.frames[0] == 255).all()


def test_ten_hours_cost_what_their_frames_cost(monkeypatch):
    data = clip(codec="mpeg4", frames=3600, fps=0.1, gop=30)
    monkeypatch.setattr(video_walk, "MOST_PIXELS", 16 * 40 * 64 * 48)  # sixteen frames, each less than forty from a keyframe
    found = open_clip(data, "a.mp4", MANY)
    assert found.duration == 36_000
    assert shades(found.shown(VideoConfig(max_frames=16)).frames) == pytest.approx([shade(n) for n in range(0, 3600, 225)], abs=8)
    sparse = open_clip(clip(codec="mpeg4", frames=900, fps=0.1, gop=600, pixels=lambda number, size: picture(0, size)), "a.mp4", MANY)
    with pytest.raises(BadSample, match=r"a.mp4: more than .* keyframes lie too far apart; encode it anew"):
        sparse.shown(VideoConfig(max_frames=16))


@pytest.mark.parametrize("form", ["mp4", "matroska", "webm", "avi"])
def test_a_late_part_is_sought(form, monkeypatch):
    monkeypatch.setattr(video_walk, "MOST_PIXELS", 60 * 64 * 48)  # of six hundred frames
    data = clip(form, frames=600, gop=20)
    shown = open_clip(data, "a.mp4", 10**6, Span(Fraction(55), Fraction(57))).shown(VideoConfig(fps=2))
    assert shades(shown.frames) == pytest.approx([shade(number) for number in (550, 555, 560, 565)], abs=4)


def shown_as_decoded(data, config=VideoConfig(fps=2), span=None):  # noqa: B008
    """The frames of a clip beside those of FFmpeg's own order from the beginning."""
    clip_ = open_clip(data, "a.mp4", 10**6, *([span] if span else []))
    frames, begin = all_frames(data), span.start if span else Fraction(0)
    right = [[grey for time, grey in frames if time - frames[0][0] <= begin + one][-1] for one in clip_.times(config)]
    assert shades(clip_.shown(config).frames) == pytest.approx(right, abs=4)
    return clip_


@pytest.mark.parametrize("begin", [-3, -1, -0.02, 0, 1, 7])
@pytest.mark.parametrize("form", ["webm", "matroska"])
def test_matroska_that_does_not_begin_at_zero(form, begin):
    """A seek to zero does not come back to a first picture before it, and its header says when it ends, not how long it lasts."""
    times = [begin + number / 10 for number in range(60)]
    data = clip(form, "libvpx-vp9", frames=60, gop=20, times=times, options={"avoid_negative_ts": "disabled"})
    whole = shown_as_decoded(data)
    assert float(whole.duration) == pytest.approx(6, abs=0.15)
    shown_as_decoded(data, span=Span(Fraction(4), Fraction(5)))


@pytest.mark.parametrize("form", ["mp4", "matroska"])
@pytest.mark.parametrize("form_of_pictures", ["open-gop=1:keyint=20:bframes=3:scenecut=0", "intra-refresh=1:keyint=20"])
def test_pictures_that_need_what_stands_before_a_keyframe(form, form_of_pictures):
    data = clip(form, frames=200, gop=20, b_frames=3, codec_options={"x264-params": form_of_pictures})
    for span in (None, Span(Fraction(12), Fraction(13)), Span(Fraction(301, 20), Fraction(16))):
        shown_as_decoded(data, VideoConfig(fps=2, max_frames=8), span)


def test_a_recording_without_an_index_is_sought_in(monkeypatch):
    data = clip("webm", frames=600, gop=20, options={"live": "1"})
    monkeypatch.setattr(video_walk, "MOST_PIXELS", 350 * 64 * 48)  # of six hundred frames
    for span in (Span(), Span(Fraction(25), Fraction(60))):
        shown_as_decoded(data, VideoConfig(max_frames=8), span)


def test_frames_as_pictures():
    pictures = [(f"f{number:04d}.png", encoded(Image.fromarray(picture(number)))) for number in range(12)]
    found = clip_of_pictures(pictures, 4, MANY)
    assert found.duration == 3 and found.full_size == (64, 48)
    assert shades(found.shown(VideoConfig(fps=2)).frames) == [shade(number) for number in range(0, 12, 2)]
    part = clip_of_pictures(pictures, 4, MANY, Span(Fraction(1), Fraction(2)))
    assert shades(part.shown(VideoConfig(fps=4)).frames) == [shade(number) for number in range(4, 8)]
    for fps in (None, 0, -1, "4", True, float("nan")):
        with pytest.raises(BadSample, match="and the JSON's 'fps' is"):
            clip_of_pictures(pictures, fps, MANY)
    pictures[4] = ("f0004.png", encoded(Image.new("RGB", (8, 8))))
    with pytest.raises(BadSample, match=r"f0004.png: 8 x 8 pixels, the first frame 64 x 48"):
        clip_of_pictures(pictures, 4, MANY).shown(VideoConfig(fps=4))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no video that is read here; expected mp4, mov, webm, mkv, avi or gif"),
        (b"#EXTM3U\nhttp://127.0.0.1/secret.mp4\n", "no video that is read here"),
        (sound(), "it has no pictures, only sound"),
        (clip()[:1500], "damaged or cut short"),
        (clip("gif")[:-2000], "cut short: no end"),
        (clip("webm", frames=60)[:-1500], "cut short|damaged"),
        (b"GIF89a" + b"\xff\xff\xff\xff" + clip("gif", frames=2)[10:], "damaged or cut short"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(data, reason):
    with pytest.raises(BadSample, match=f"^odd: .*(?:{reason})"):
        open_clip(data, "odd", MANY).shown(VideoConfig())


def test_damage_ends_in_a_reason():
    """Two hundred damaged clips: each gives whole frames or one reason, and nothing else is raised."""
    whole, dice = [clip(**FILES[name]) for name in ("mp4", "webm", "matroska", "avi", "gif", "fragments")], random.Random(0)
    read = refused = 0
    for number in range(200):
        try:
            shown = open_clip(damaged(whole[number % len(whole)], dice), "odd", 10**7).shown(VideoConfig(max_frames=8))
            assert len(shown.frames) == len(shown.times) <= 8
            read += 1
        except BadSample as reason:
            assert str(reason).startswith("odd: ") and "\n" not in str(reason)
            refused += 1
    assert read + refused == 200 and read > 20 and refused > 60


def test_the_same_in_many_threads():
    datas = [clip(**FILES[name]) for name in ("mp4", "webm", "b-frames")] * 4

    def frames(data):
        return open_clip(data, "a", MANY).shown(VideoConfig(fps=5)).frames

    alone = [frames(data) for data in datas]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, alone, pool.map(frames, datas)))
