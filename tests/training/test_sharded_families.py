"""ZeRO-3 for every family: weights that a module reads of another are whole when they are read, in loading, training and answering."""

from __future__ import annotations

import json

import pytest

from tests.conftest import losses_of, write_config
from vlm_dist import load_config, train
from vlm_dist.run_dir import read_jsonl

pytestmark = pytest.mark.slow


def test_stage_3_is_stage_0(any_checkpoint, shards, settings, tmp_path):
    """Losses, and the answers before and after."""
    settings["model"]["name"] = any_checkpoint
    settings["data"] |= {"train": shards["qa-train"][:1], "max_seq_length": 1024}
    settings |= {"training": {"steps": 2, "global_batch": 2, "micro_batch": 2}, "evaluation": {"samples": 2, "max_new_tokens": 2}}
    found = []
    for stage in (0, 3):
        train(load_config(write_config(settings, tmp_path), [f"engine.zero_stage={stage}", f"name=stage-{stage}"]))
        run = tmp_path / "runs" / f"stage-{stage}"
        answers = [[row["answer"] for row in read_jsonl(run / "samples" / f"{when}.jsonl")] for when in ("before", "after")]
        found.append((losses_of(run), answers))
    (losses, answers), (sharded, same) = found
    assert sharded == pytest.approx(losses, rel=1e-5) and same == answers and len(answers[0]) == 2, json.dumps(found)
