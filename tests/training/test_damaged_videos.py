"""Damaged clips never end a run, nor hang it: each is left out with its reason, and every other sample trains."""

from __future__ import annotations

import json
import random

import pytest

from tests.conftest import losses_of, write_config
from tests.videos import clip, damaged
from vlm_dist import load_config, train
from vlm_dist.config_model import VideoConfig
from vlm_dist.data.shards import write_shard
from vlm_dist.data.video import open_clip
from vlm_dist.errors import BadSample

FORMS = ("mp4", "webm", "mkv", "avi", "gif")
VIDEO = {"max_frames": 4, "min_frames": 2}


def is_whole(data: bytes) -> bool:
    try:
        open_clip(data, "c", 64_000_000).shown(VideoConfig(**VIDEO))
    except BadSample:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_damaged_clips(checkpoint, tmp_path):
    """Of 240 clips of every form all but each sixth are damaged, by a seeded fuzzer; one epoch of them."""
    whole = {form: clip({"mkv": "matroska"}.get(form, form), frames=20) for form in FORMS}
    dice, samples, refused = random.Random(1), [], set()
    for number in range(240):
        form = FORMS[number % len(FORMS)]
        data = damaged(whole[form], dice) if number % 6 else whole[form]
        turns = [{"role": "user", "content": "<video>Which?"}, {"role": "assistant", "content": f"number {number % 8}"}]
        samples.append({"__key__": f"{number:03d}", form: data, "json": json.dumps({"messages": turns}).encode()})
        refused |= set() if is_whole(data) else {f"{number:03d}"}
    write_shard(tmp_path / "a.tar", samples)
    settings = {
        "name": "run", "output_dir": str(tmp_path), "model": {"name": str(checkpoint("qwen2_5_vl")), "dtype": "float32"}, "lora": {"r": 2},
        "data": {"train": [str(tmp_path / "a.tar")], "max_bad_fraction": 1, "max_seq_length": 512, "workers": 3, "video": VIDEO},
        "training": {"steps": 12, "global_batch": 20, "micro_batch": 10}, "log": {"wandb": "disabled"},
    }  # fmt: skip
    train(load_config(write_config(settings, tmp_path)))
    told = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {row["key"] for row in told} == refused and len(refused) > 60
    assert all("\n" not in row["reason"] and row["reason"].split(":")[0] in FORMS for row in told)
    assert len(losses_of(tmp_path / "run")) == 12
