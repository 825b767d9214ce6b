"""Ranks of which one has videos, another pictures or texts alone, train as one rank that has all of it does."""

from __future__ import annotations

import json

import pytest

from tests.conftest import losses_of
from tests.launch.test_experts_on_ranks import ALL_SHARDED
from tests.launch.test_parity import config, many, two_ranks  # noqa: F401
from tests.videos import clip, picture
from vlm_dist import load_config, train
from vlm_dist.data.shards import write_shard

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def write_samples(path) -> None:
    """In each four one of videos, one of pictures, and two of text alone."""
    import io

    from PIL import Image

    samples = []
    for number in range(32):
        buffer = io.BytesIO()
        Image.fromarray(picture(number)).save(buffer, "PNG")
        files = [{"mp4": clip(frames=10 + number)}, {}, {"png": buffer.getvalue()}, {}][number % 4]
        turns = [{"role": "user", "content": "Which one?"}, {"role": "assistant", "content": f"number {number % 8}"}]
        samples.append({"__key__": f"{number:03d}", **files, "json": json.dumps({"messages": turns}).encode()})
    write_shard(path, samples)


def test_videos_on_one_rank_at_every_stage(config, checkpoint, tmp_path):  # noqa: F811
    write_samples(tmp_path / "moving.tar")
    common = [f"model.name={checkpoint('qwen2_5_vl')}", f"data.train={tmp_path / 'moving.tar'}", "data.heldout=[]",
              "training.micro_batch=1", "training.steps=4", "data.video.max_frames=4", "data.packing=false"]  # fmt: skip
    runs = {stage: [*common, f"name=stage-{stage}", f"engine.zero_stage={stage}"] for stage in (0, 2, 3)}
    runs[3] += [f"engine.deepspeed={json.dumps({'zero_optimization': ALL_SHARDED})}", "model.gradient_checkpointing=true"]
    runs[4] = [*common, "name=stage-4", "data.packing=true", "engine.zero_stage=3"]
    output = two_ranks("tests/launch/many.py", many(config, list(runs.values()), tmp_path))
    train(load_config(config, [*common, "name=one"]))
    train(load_config(config, [*common, "name=packed", "data.packing=true"]))
    for stage in runs:
        expected = losses_of(tmp_path / "runs" / ("packed" if stage == 4 else "one"))
        assert losses_of(tmp_path / "runs" / f"stage-{stage}") == pytest.approx(expected, rel=1e-4), (stage, output[-2000:])
