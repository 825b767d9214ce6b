"""Two ranks that share each row (engine.sequence_parallel) train as one rank does."""

from __future__ import annotations

import json

import pytest

from tests.conftest import losses_of
from tests.launch.test_parity import config, many, reference, several_ranks, stopped_at, two_ranks  # noqa: F401
from vlm_dist import load_config, train
from vlm_dist.run_dir import read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SHARED = "engine.sequence_parallel=2"


def test_losses_are_those_of_one_rank(config, reference, shards, qwen, checkpoint, tmp_path):  # noqa: F811
    """QLoRA with gradient checkpointing at stages 0, 2 and 3; packed rows with M-RoPE; experts whose load is evened out; with held-out
    samples, answered by whole rows."""
    whole = ["training.steps=2", "model.gradient_checkpointing=true", f"data.heldout={json.dumps(shards['qa-heldout'])}"]
    whole += ["evaluation.samples=3", "evaluation.max_new_tokens=2"]
    packed = [*whole, f"model.name={qwen}", "data.packing=true", "training.micro_batch=2"]
    runs = {f"stage-{stage}": [*whole, SHARED, f"engine.zero_stage={stage}", "training.micro_batch=2"] for stage in (0, 2, 3)}
    runs["packed"] = [*packed, SHARED]
    sparse = [*whole, f"model.name={checkpoint('qwen3_vl_moe')}", "training.micro_batch=2", "training.router_aux_loss=0.5"]
    runs["sparse"] = [*sparse, SHARED]
    two_ranks("tests/launch/many.py", many(config, [[*words, f"name={name}"] for name, words in runs.items()], tmp_path))
    expected = {"whole": reference("whole", *whole), "rows": reference("rows", *packed), "experts": reference("experts", *sparse)}
    for name in runs:
        same = {"packed": "rows", "sparse": "experts"}.get(name, "whole")
        assert losses_of(tmp_path / "runs" / name) == pytest.approx(expected[same], rel=1e-4), name
        ours, theirs = (read_jsonl(tmp_path / "runs" / one / "metrics.jsonl") for one in (name, same))
        steps = [[row for row in rows if "loss" in row][-1] for rows in (ours, theirs)]
        for key in ("samples", "tokens", "label_tokens"):
            assert steps[0][key] == steps[1][key], (name, key)
        assert steps[0]["grad_norm"] == pytest.approx(steps[1]["grad_norm"], rel=1e-3), name
        aux = [step.get("experts", {}).get("aux_loss") for step in steps]
        assert aux[0] == (pytest.approx(aux[1], rel=1e-4) if name == "sparse" else None), name
        answers = [[row["answer"] for row in read_jsonl(tmp_path / "runs" / one / "samples" / "after.jsonl")] for one in (name, same)]
        assert answers[0] == answers[1] and len(answers[0]) == 3


def test_a_run_goes_on_with_rows_shared_and_not(config, reference, tmp_path):  # noqa: F811
    """Two ranks that share rows -> one rank -> four that share rows, stopped by SIGTERM; the curve is that of one that never stopped."""
    more = ["name=changing", "training.steps=8", "training.micro_batch=2"]
    two_ranks("tests/launch/many.py", many(config, [[*more, SHARED]], tmp_path, {0: 5}))
    state = tmp_path / "runs" / "changing" / "summary.json"
    assert json.loads(state.read_text())["ended"] == "interrupted"
    stopped_at(config, 5, more)
    assert json.loads(state.read_text())["step"] == 5
    four = [*more, "engine.sequence_parallel=4", "engine.zero_stage=2"]
    several_ranks(4, "tests/launch/many.py", many(config, [four], tmp_path))
    assert losses_of(tmp_path / "runs" / "changing") == pytest.approx(reference("whole", "training.steps=8"), rel=1e-4)
    assert json.loads(state.read_text())["samples"] == 4 * 8


def test_a_family_that_cannot_is_refused(config, checkpoint):  # noqa: F811
    """By the check of the configuration too, before any rank starts."""
    from vlm_dist.checking.dry_run import dry_run
    from vlm_dist.errors import ConfigError

    cannot = load_config(config, [f"model.name={checkpoint('mllama')}", SHARED, "training.micro_batch=1"])
    with pytest.raises(ConfigError, match=r"engine\.sequence_parallel=2: rows of 'mllama' cannot be cut"):
        dry_run(cannot, 2)
    with pytest.raises(ConfigError, match=r"engine\.sequence_parallel=2: 1 ranks"):
        train(cannot)
