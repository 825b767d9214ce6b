"""Records of videos, as LLaVA-Video, ShareGPT4Video, Video-ChatGPT and VideoQA write them, become shards that training reads."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.videos import all_frames, clip, shade, sound
from vlm_dist.config_model import VideoConfig
from vlm_dist.data.layouts import canonical
from vlm_dist.data.pack_pictures import in_words
from vlm_dist.data.pack_records import LEFT_OUT, pack_records
from vlm_dist.data.samples import parse_sample
from vlm_dist.data.shards import read_in_order
from vlm_dist.data.video import Span, open_clip
from vlm_dist.errors import DataError

MP4 = clip(frames=40)


def packed(tmp_path, records, files=None, **options):
    """(raw samples of the training shards, what was made)."""
    for name, data in (files or {"a.mp4": MP4}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "r.json").write_text(json.dumps(records))
    made = pack_records(tmp_path / "r.json", tmp_path / "out", processes=1, **options)
    return list(read_in_order([str(path) for path in made["train"].shards])), made


def opened(raw):
    return parse_sample(raw, max_image_pixels=10**7, caption_prompt="Describe it.")


LLAVA = [{"from": "human", "value": "<image>\nWhat happens?"}, {"from": "gpt", "value": "It turns grey."}]
TYPED = [
    {"role": "user", "content": [{"type": "video", "video": "file://a.mp4"}, {"type": "text", "text": "What happens?"}]},
    {"role": "assistant", "content": "It turns grey."},
]
CAPTIONS = [{"idx": "0", "content": "Dark."}, {"idx": "-1", "content": "It turns grey."}, {"idx": "0-1", "content": "Brighter."}]


@pytest.mark.parametrize(
    ("record", "name", "asked"),
    [
        ({"id": "1", "video": "academic/a.mp4", "data_source": "0_30_s", "conversations": LLAVA}, "academic/a.mp4", "What happens?"),
        ({"video": "a.mp4", "conversations": [{**LLAVA[0], "value": "<video>\nWhat happens?"}, LLAVA[1]]}, "a.mp4", "What happens?"),
        ({"videos": ["a.mp4"], "messages": [{"role": "user", "content": "What happens?"}, TYPED[1]]}, "a.mp4", "What happens?"),
        ({"messages": TYPED}, "a.mp4", "What happens?"),
        ({"video_id": "x", "video_path": "pexels/a.mp4", "captions": CAPTIONS, "timestamp": [0, 2]}, "pexels/a.mp4", "Describe it."),
        ({"q": "What happens?", "a": "It turns grey.", "video_id": "v_k_ZXmr8"}, "v_k_ZXmr8.mkv", "What happens?"),
        ({"question": "What happens?", "answer": "It turns grey.", "video_id": 1301, "category_id": 14}, "video1301.mp4", "What happens?"),
        ({"question": "What happens?", "answer": "It turns grey.", "video_name": "1QIUV7"}, "v_1QIUV7.webm", "What happens?"),
        ({"file_name": "a.mov", "caption": "It turns grey."}, "a.mov", "Describe it."),
    ],
    ids=[
        "LLaVA-Video",
        "Video-LLaVA",
        "ms-swift",
        "Qwen's parts",
        "ShareGPT4Video",
        "Video-ChatGPT",
        "MSR-VTT-QA",
        "ActivityNet-QA",
        "file",
    ],
)
def test_layouts(tmp_path, record, name, asked):
    form = name.rpartition(".")[2]
    data = clip({"mkv": "matroska", "mov": "mov"}.get(form, form), frames=20)
    (raw,), made = packed(tmp_path, [record], {name: data})
    assert [raw[kind] for kind in ({"mov": "mp4"}.get(form, form),)] == [data]  # byte for byte
    sample = opened(raw)
    assert [[part["type"] for part in turn["content"]] for turn in sample.messages] == [["video", "text"], ["text"]]
    assert [sample.messages[0]["content"][1]["text"], sample.messages[1]["content"][0]["text"]] == [asked, "It turns grey."]
    assert len(sample.videos) == 1 and not sample.images and not made["train"].left_out
    assert "no picture" not in made["train"].notes


def test_an_option_named_a_is_no_answer():
    with pytest.raises(Exception, match="no text in a layout"):
        canonical({"question": "Which?", "a": "red", "b": "blue", "video": "a.mp4"})


def test_pictures_and_videos_of_one_record(tmp_path):
    from PIL import Image

    from tests.videos import picture

    Image.fromarray(picture(3)).save(tmp_path / "p.png")
    turns = [{"role": "user", "content": "<image> or <video> or <video>?"}, {"role": "assistant", "content": "both"}]
    records = [{"image": "p.png", "videos": ["a.mp4", "b.gif"], "messages": turns, "start": [1, None], "end": [2, None]}]
    (raw,), _ = packed(tmp_path, records, {"a.mp4": MP4, "b.gif": clip("gif", frames=10)})
    assert {"png", "0.mp4", "1.gif"} < raw.keys()
    sample = opened(raw)
    assert [part["type"] for part in sample.messages[0]["content"] if part["type"] != "text"] == ["image", "video", "video"]
    assert [float(one.duration) for one in sample.videos] == [1, 1]


@pytest.mark.parametrize(("form", "gop"), [("mp4", 12), ("matroska", 10), ("webm", 10)])
@pytest.mark.parametrize(("start", "end"), [(6.35, 8.1), (0, 1.3), (7.05, None), (2.42, 2.55)])
def test_cut_where_it_shows_the_same_frames(tmp_path, form, gop, start, end):
    data = clip(form, frames=100, gop=gop)
    record = {"video": "a", "question": "Which?", "answer": "this", "start": start, "end": end}
    (raw,), made = packed(tmp_path, [record], {"a.mp4": data})
    (whole,) = opened({**raw, "mp4": data, "json": json.dumps({**record, "video": None}).encode()} | {"mkv": data}).videos[:1]
    (part,) = opened(raw).videos
    assert made["train"].notes["cut"] == 1 and len(part.data) < 0.8 * len(data)
    for config in (VideoConfig(), VideoConfig(fps=7, max_frames=30)):
        torch.testing.assert_close(part.shown(config).frames, whole.shown(config).frames, rtol=0, atol=0)
    assert part.start < 1.3  # from the keyframe before
    frames = all_frames(part.data)
    assert float(part.shown(VideoConfig(min_frames=1)).frames[0][:, :, 20:40].float().mean()) == pytest.approx(
        shade(round(start * 10 - 0.4)), abs=4
    )
    assert frames[-1][0] >= part.start + part.duration - 0.2


@pytest.mark.parametrize(("form", "turned"), [("mp4", 0), ("mp4", 90), ("avi", 0), ("webm", 0)])
def test_encoded_anew_without_loss_where_it_begins_between_keyframes(tmp_path, form, turned):
    """One keyframe, at the beginning; and AVI, which is not cut."""
    data = clip(form, frames=300, gop=400, turned=turned, fps=25)
    record = {"video": f"a.{form}", "question": "Which?", "answer": "this", "start": 9.01, "end": 10.13}
    (raw,), made = packed(tmp_path, [record], {f"a.{form}": data})
    whole = open_clip(data, "a", 10**6, Span(Fraction(9.01), Fraction(10.13)))
    (part,) = opened(raw).videos
    assert made["train"].notes["encoded anew"] == 1 and len(part.data) < 0.5 * len(data) and "mp4" in raw
    for config in (VideoConfig(), VideoConfig(fps=11, max_frames=30)):
        torch.testing.assert_close(part.shown(config).frames, whole.shown(config).frames, rtol=0, atol=0)
    assert any("encoded anew (H.264 without loss)" in line for line in in_words(made["train"].notes, None))


def test_kept_whole_where_a_part_is_no_smaller(tmp_path):
    """Noise; a GIF; and H.264 has no odd sizes."""
    files = {"a.mp4": clip(frames=40, gop=400, pixels=noise), "b.gif": clip("gif", frames=40)}
    files["c.avi"] = clip("avi", "ffv1", frames=40, size=(63, 47))
    records = [{"video": name, "question": "Which?", "answer": "this", "start": 0.5, "end": 4} for name in files]
    raws, made = packed(tmp_path, records, files)
    assert [json.loads(raw["json"])["start"] for raw in raws] == [0.5] * 3 and raws[0]["mp4"] == files["a.mp4"]
    assert any("kept whole, and both stay in the JSON" in line for line in in_words(made["train"].notes, None))


def noise(number: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)


def test_what_cannot_be_used_is_named_by_name_and_number(tmp_path):
    asked = {"question": "Which?", "answer": "this"}
    files = {"good.mp4": MP4, "cut.mp4": MP4[: len(MP4) // 2], "sound.mp4": sound(), "text.mp4": b"no video" * 20}
    names = [*files, "gone.mp4", 17]
    records = [*({"video": name, **asked} for name in names), {"video": "good.mp4", "start": 9, **asked}]
    raws, made = packed(tmp_path, records, files)
    assert len(raws) == 1 and made["train"].left_out == 6
    rows = {row["record"]: row["reason"] for row in map(json.loads, (tmp_path / "out" / LEFT_OUT).read_text().splitlines())}
    expected = {
        1: "'cut.mp4'", 2: "only sound", 3: "no video that is read", 4: "'gone.mp4' cannot be read below", 5: "'17' does not lie below",
        6: "'start' is 9 s, and the video lasts 4 s",
    }  # fmt: skip
    assert rows.keys() == expected.keys()
    for number, words in expected.items():
        assert words in rows[number] and rows[number].startswith("video "), rows[number]


def test_heldout_videos_are_trained_on_under_no_other_name(tmp_path):
    files = {f"{number}.mp4": clip(frames=20 + number) for number in range(4)}
    files |= {f"copy{number}.mp4": files[f"{number}.mp4"] for number in range(4)}
    records = [{"video": name, "question": "Which?", "answer": "this"} for name in files]
    raws, made = packed(tmp_path, records, files, heldout=2)
    held = list(read_in_order([str(path) for path in made["heldout"].shards]))
    assert len(raws) == 6 and len({raw["mp4"] for raw in held}) == 1
    assert not {raw["mp4"] for raw in held} & {raw["mp4"] for raw in raws}


def test_shards_of_videos_are_packed_anew(tmp_path):
    packed(tmp_path, [{"video": "a.mp4", "question": "Which?", "answer": "this"}])
    made = pack_records(tmp_path / "out", tmp_path / "again", processes=1)
    (raw,) = read_in_order([str(path) for path in made["train"].shards])
    assert raw["mp4"] == MP4 and len(opened(raw).videos) == 1


def test_none_can_be_used(tmp_path):
    with pytest.raises(DataError, match=r"none of the 1 records can be used; the first: video 'gone.mp4' cannot be read below"):
        packed(tmp_path, [{"video": "gone.mp4", "question": "Which?", "answer": "this"}])
