"""Ranks whose tokens choose other experts train as one rank that has all the tokens does."""

from __future__ import annotations

import json

import pytest

from tests.conftest import losses_of
from tests.launch.many import halve_experts
from tests.launch.test_parity import config, many, two_ranks  # noqa: F401
from vlm_dist import load_config, train
from vlm_dist.run_dir import read_jsonl
from vlm_dist.training import train as loop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ALL_SHARDED = dict.fromkeys(
    ("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 0
)


@pytest.mark.parametrize("packing", [False, True])
def test_disjoint_experts_at_every_stage(config, checkpoint, tmp_path, monkeypatch, packing):  # noqa: F811
    """The first rank uses one half of the experts, the second the other; routers train, with their loss; one row a micro-batch, which
    holds several samples with packing."""
    model = [f"model.name={checkpoint('qwen3_vl_moe')}", "lora.router=full", "training.micro_batch=1", "training.steps=2"]
    model += ["data.packing=true", "data.max_seq_length=512"] if packing else []
    runs = {stage: [*model, f"name=stage-{stage}", f"engine.zero_stage={stage}"] for stage in ((3,) if packing else (0, 2, 3))}
    runs[3] += [f"engine.deepspeed={json.dumps({'zero_optimization': ALL_SHARDED})}", "model.gradient_checkpointing=true"]
    output = two_ranks("tests/launch/many.py", many(config, list(runs.values()), tmp_path, dict.fromkeys(range(len(runs)), "halves")))

    rounds, samples = 0, []

    def counted(model, batch, *more):
        nonlocal rounds
        rounds += 1
        samples.append(int((batch["position_ids"][0] == 0).sum()) if packing else 1)  # of a row
        return summed_loss(model, batch, *more)

    summed_loss = loop.summed_loss
    monkeypatch.setattr(loop, "summed_loss", counted)
    restore = halve_experts(lambda: (rounds - 1) % 4 // 2)  # the first two of four rows are the first rank's
    try:
        train(load_config(config, [*model, "name=one"]))
    finally:
        restore()
    assert (min(samples) > 1) == packing, samples
    expected = losses_of(tmp_path / "runs" / "one")
    load = [row["experts"] for row in read_jsonl(tmp_path / "runs" / "one" / "metrics.jsonl") if "experts" in row]
    assert len(load) == 2 and all(row["aux_loss"] > 0 and row["of"] == 24 for row in load)
    for stage in runs:
        run = tmp_path / "runs" / f"stage-{stage}"
        assert losses_of(run) == pytest.approx(expected, rel=1e-4), (stage, output[-2000:])
        found = [row["experts"] for row in read_jsonl(run / "metrics.jsonl") if "experts" in row]
        assert [row["aux_loss"] for row in found] == pytest.approx([row["aux_loss"] for row in load], rel=1e-3)
        assert [row["busiest"] for row in found] == pytest.approx([row["busiest"] for row in load], rel=0.02)
