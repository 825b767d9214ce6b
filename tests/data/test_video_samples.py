"""Samples with videos: the forms, what is told of them, and the stream that trains on them."""

from __future__ import annotations

import io
import json

import pytest
import torch
from PIL import Image

from tests.videos import clip, picture
from vlm_dist.config import DataConfig
from vlm_dist.config_model import VideoConfig
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.samples import outline, parse_sample
from vlm_dist.data.shards import write_shard
from vlm_dist.data.stream import merge_states, open_stream
from vlm_dist.errors import BadSample

OPTIONS = {"max_image_pixels": 10**6, "caption_prompt": "Describe."}
MP4, GIF = clip(), clip("gif", frames=20)
VIDEO = {"type": "video"}


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(number)).save(buffer, "PNG")
    return buffer.getvalue()


def raw(record: dict | None = None, **members: bytes) -> dict:
    made = {name.replace("_", "."): data for name, data in members.items()}
    return {"__key__": "k", "__url__": "s.tar", **made, **({"json": json.dumps(record).encode()} if record is not None else {})}


def chat(asked, said: str = "red") -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def kinds(sample) -> list[str]:
    return [part.get("text", part["type"]) for part in sample.messages[0]["content"]]


def parse(*given, **members):
    return parse_sample(raw(*given, **members), **OPTIONS)


@pytest.mark.parametrize("form", ["mp4", "m4v", "mov", "webm", "mkv", "avi", "gif"])
def test_a_video_is_a_member_by_its_extension(form):
    kind = {"mkv": "matroska", "m4v": "mp4"}.get(form, form)
    sample = parse(chat("What moves?"), **{form: clip(kind, frames=5)})
    assert [one.name for one in sample.videos] == [form] and kinds(sample) == ["video", "What moves?"]
    assert sample.images == [] and sample.notes == set()


def test_videos_and_pictures_in_one_conversation():
    sample = parse(chat("First <video> then <image> and <video>."), **{"1_gif": GIF, "0_mp4": MP4, "png": png()})
    assert kinds(sample) == ["First ", "video", " then ", "image", " and ", "video", "."]
    assert [one.name for one in sample.videos] == ["0.mp4", "1.gif"] and len(sample.images) == 1
    parts = parse(chat([{"type": "text", "text": "See"}, VIDEO, {"type": "image"}]), mp4=MP4, png=png())
    assert kinds(parts) == ["See", "video", "image"]
    llava = {"video": "clips/a.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}
    assert kinds(parse(llava, mp4=MP4)) == ["video", "What?"]
    assert [part["type"] for part in parse(None, mp4=MP4, txt=b"a cat").messages[0]["content"]] == ["video", "text"]
    assert parse(chat("What?", "The tag <video>."), mp4=MP4).messages[1]["content"] == [{"type": "text", "text": "The tag <video>."}]


def test_frames_beside_the_record():
    sample = parse(chat("<video>What?") | {"fps": 2}, **{f"f{number:04d}_png": png(number) for number in range(6)})
    assert sample.videos[0].duration == 3 and sample.notes == set() and sample.images == []
    two = {f"{video}_f{number}_png": png(number) for video in (1, 0) for number in range(2 + video)}
    assert [float(one.duration) for one in parse(chat("<video><video>What?") | {"fps": [1, 3]}, **two).videos] == [2, 1]


def test_parts_of_videos():
    assert parse(chat("What?") | {"start": 1, "end": 2.5}, mp4=MP4).videos[0].duration == 1.5
    two = {"0_mp4": MP4, "1_mp4": MP4}
    assert [float(one.duration) for one in parse(chat("What?") | {"start": [0, 1], "end": [None, 2]}, **two).videos] == [3, 1]
    part = {**VIDEO, "start": 1, "end": 2.5}
    sample = parse(chat([part, {"type": "text", "text": "What?"}]), mp4=MP4)
    assert sample.videos[0].duration == 1.5 and sample.notes == set()
    sample = parse(chat([VIDEO, {**VIDEO, "video_start": 0, "video_end": 2, "nframes": 3}, {"type": "text", "text": "What?"}]), **two)
    assert [float(one.duration) for one in sample.videos] == [3, 2] and sample.notes == {("part key", "nframes")}
    sample = parse(chat([{**VIDEO, "video": {"path": "a.mp4", "start": 1, "end": 2}}, {"type": "text", "text": "What?"}]), mp4=MP4)
    assert sample.videos[0].duration == 1
    mixed = [{"role": "user", "content": [{**VIDEO, "start": 1, "end": 2}, {"type": "text", "text": "?"}]}, chat("")["messages"][1]]
    mixed += [{"role": "user", "content": "<video>And this?"}, chat("")["messages"][1]]
    assert [float(one.duration) for one in parse({"messages": mixed}, **two).videos] == [1, 3]


@pytest.mark.parametrize(
    ("record", "members", "reason"),
    [
        (chat("<video><video>What?"), {"mp4": MP4}, r"the text speaks of 2 videos, the sample has 1 \(the files of 'k': mp4, json\)"),
        (chat("<video>What?"), {}, "the text speaks of 1 videos, the sample has 0"),
        (chat([VIDEO]), {"png": png()}, "the text speaks of 1 videos, the sample has 0"),
        (chat("What?") | {"video": "a.mp4"}, {"png": png()}, "'video' is 'a.mp4'; a video is expected as a member, KEY.mp4"),
        (chat("What?"), {"mp4": b"text"}, "mp4: no video that is read here"),
        (chat("What?"), {"f0_png": png(), "f1_png": png()}, r"f0.png: frames of a video, and the JSON's 'fps' is None"),
        (chat("What?"), {"mp4": MP4, "f0_png": png()}, r"mp4 and f0.png: a video's file or its frames are expected, not both"),
        (chat("What?") | {"start": 2, "end": 1}, {"mp4": MP4}, "'start' is 2 s and 'end' 1 s; expected a later end"),
        (chat("What?") | {"start": 5}, {"mp4": MP4}, "mp4: 'start' is 5 s, and the video lasts 3 s"),
        (chat([{**VIDEO, "end": 1, "video_end": 2}]), {"mp4": MP4}, "a video's 'end' is 1, and its 'video_end' 2; leave one of them out"),
        (chat([{**VIDEO, "end": 1}]) | {"end": 2}, {"mp4": MP4}, "'end' stands in the part of a video, and beside the turns; leave one"),
        (chat("What?") | {"start": -1}, {"mp4": MP4}, "'start' is -1; expected seconds, from 0"),
        (chat("What?") | {"end": "2"}, {"mp4": MP4}, "'end' is 2; expected seconds, from 0"),
        (chat("What?") | {"end": [2]}, {"0_mp4": MP4, "1_mp4": MP4}, r"'end' is \[2\]; expected a list with one for each of 2 videos"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_says_why(record, members, reason):
    for read in (parse_sample, outline):
        with pytest.raises(BadSample, match=reason):
            read(raw(record, **members), **OPTIONS)


def config(shards: list[str], **changes) -> DataConfig:
    return DataConfig(train=shards, **{"video": VideoConfig(max_frames=6), "max_seq_length": 400, "prefetch": 1, **changes})


@pytest.fixture(scope="module")
def moving(tmp_path_factory) -> list[str]:
    """A shard in which videos, pictures and texts alternate, and one video is damaged."""
    samples = []
    for number in range(24):
        kind = [{"mp4": clip(frames=10 + number)}, {"png": png(number)}, {}, {"gif": GIF, "png": png(number)}][number % 4]
        asked = "<image>" * ("png" in kind) + "<video>" * (not kind.keys().isdisjoint({"mp4", "gif"})) + "What?"
        files = {**kind, "json": json.dumps(chat(asked, f"number {number}")).encode()}
        samples.append({"__key__": f"{number:04d}", **files})
    samples[8]["mp4"] = samples[8]["mp4"][:900]
    path = tmp_path_factory.mktemp("moving") / "train.tar"
    write_shard(path, samples)
    return [str(path)]


def stream(shards, processor, quarantine, *, pack: bool = False, rank: int = 0, ranks: int = 1, batch: int = 4, micro: int = 2, **changes):
    place = {"rank": rank, "world_size": ranks}
    made = config(shards, packing=pack, max_bad_fraction=1, **changes)
    return open_stream(made, processor, quarantine, seed=3, global_batch=batch, micro_batch=micro, pack=pack, **place)


def same(ours, theirs) -> bool:
    return ours.keys == theirs.keys and all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(ours.micro_batches, theirs.micro_batches, strict=True)
    )


@pytest.fixture
def processor(qwen):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(qwen)


@pytest.mark.parametrize("pack", [False, True])
def test_steps_are_the_same_for_any_number_of_workers_and_after_a_restart(moving, processor, tmp_path, pack):
    def first(count: int, state=None, **changes):
        made = stream(moving, processor, Quarantine(tmp_path / "q.jsonl", 1), pack=pack, **changes)
        if state:
            made.restore(state)
        try:
            return [made.next_step() for _ in range(count)], merge_states([made.state()])
        finally:
            made.close()

    one, state = first(3, workers=1)
    three, _ = first(8, workers=3)
    rest, _ = first(5, state, workers=2)
    assert all(map(same, [*one, *rest], three))
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["0008"] and "mp4: damaged or cut short" in lines[0]["reason"]


@pytest.mark.parametrize("pack", [False, True])
def test_every_micro_batch_runs_the_vision_tower_as_often(moving, processor, tmp_path, pack):
    """Once on pictures and once on videos, whatever its samples have; what joins them has no label, and no row of its own."""
    made = stream(moving, processor, Quarantine(tmp_path / "q.jsonl", 1), pack=pack, micro=1, workers=0)
    steps = [step for step, _ in zip(made.steps(), range(6), strict=False)]
    batches = [batch for step in steps for batch in step.micro_batches]
    assert all({"pixel_values", "pixel_values_videos"} <= batch.keys() for batch in batches)
    assert all(len(batch["input_ids"]) == 1 for batch in batches)
    assert sum(float((batch["labels"][:, 1:] != -100).sum()) for batch in batches) == sum(step.counts.labels for step in steps)
    made.close()


def test_a_run_without_videos_refuses_them_and_runs_as_before(moving, processor, tmp_path):
    made = stream(moving, processor, Quarantine(tmp_path / "q.jsonl", 1), video=None, workers=0)
    batches = [batch for step, _ in zip(made.steps(), range(6), strict=False) for batch in step.micro_batches]
    assert all("pixel_values" in batch and "pixel_values_videos" not in batch for batch in batches)
    reasons = {json.loads(line)["reason"] for line in (tmp_path / "q.jsonl").read_text().splitlines()}
    told = "a video, and data.video is not set; to train on videos: data: {video: {fps: 2, max_frames: 64}}"
    assert {f"mp4: {told}", f"gif: {told}"} <= reasons
    made.close()
