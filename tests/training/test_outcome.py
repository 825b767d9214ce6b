"""One denominator: what a step reports and what it descends is the mean over all supervised tokens, however they are cut."""

from __future__ import annotations

import math

import pytest
import torch

from tests.conftest import write_config
from vlm_dist import distributed, load_config, train
from vlm_dist.data.encode import IGNORED
from vlm_dist.data.stream import Counts, Step, Stream
from vlm_dist.run_dir import read_jsonl
from vlm_dist.training import train as loop
from vlm_dist.training.outcome import Shares, count_over_ranks


def test_the_totals_of_a_step():
    step = Step([], Counts(samples=4, tokens=50, slots=64, labels=20, patches=300), [], labels=[13, 7])
    totals, shares = count_over_ranks(step, distributed.alone())
    assert totals == step.counts and shares == Shares(labels=[13, 7], slots=[64], patches=[300])
    assert all(type(number) is int for number in (*shares.labels, totals.labels))


def test_who_has_most_to_do_and_what_each_data_set_loses():
    row = Shares(labels=[10, 0, 4], slots=[100.0, 50.0], patches=[0.0, 0.0]).metrics(["a", "b", "c"], [5.0, 0.0, math.inf])
    assert row == {"imbalance": {"tokens": 0.3333, "patches": 0.0}, "loss_by_dataset": {"a": 0.5, "b": None, "c": None}}
    assert Shares([10], [100.0], [3.0]).metrics(["a"], [5.0]) == {"imbalance": {"tokens": 0.0, "patches": 0.0}}
    for names, sums in ((["a", "b"], [1.0, 1.0, 1.0]), (["a", "b", "c"], [1.0, 1.0])):
        with pytest.raises(ValueError, match="zip"):
            Shares([1, 1], [1.0], [1.0]).metrics(names, sums)


@pytest.mark.parametrize(("stage", "kept"), [(0, None), (2, None), (0, 1), (0, 0)])
def test_loss_and_gradient_of_a_step_are_those_of_the_mean(settings, tmp_path, monkeypatch, stage, kept):
    """Recomputed from the batches that the loop saw, and the model that it trains (which a learning rate of nothing leaves as it was);
    also where all but one token, or all of them, have no label."""
    seen, original, next_step = [], loop.summed_loss, Stream.next_step

    def watched(engine, batch):
        seen.append((engine.module, batch))
        return original(engine, batch)

    def sparse(stream):
        step = next_step(stream)
        if kept is not None:
            step.counts.labels, step.labels = kept, [kept]
            for number, batch in enumerate(step.micro_batches):
                rows, places = (batch["labels"][:, 1:] != IGNORED).nonzero()[kept * (number == 0) :].T
                batch["labels"][rows, places + 1] = IGNORED
                batch["labels"][:, 0] = IGNORED
                del batch["supervised_rows"]  # worked out before
        return step

    monkeypatch.setattr(loop, "summed_loss", watched)
    monkeypatch.setattr(Stream, "next_step", sparse)
    settings["data"]["heldout"] = []
    overrides = ["training.steps=1", "optim.lr=1e-30", f"engine.zero_stage={stage}", "model.load_in_4bit=false"]
    train(load_config(write_config(settings, tmp_path), overrides))
    (row,) = [row for row in read_jsonl(tmp_path / "runs" / "tiny" / "metrics.jsonl") if "loss" in row]
    model, batches = seen[0][0], [batch for _, batch in seen]
    labels = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    assert len(batches) == 2 and row["label_tokens"] == labels and (labels == kept or labels > 10)
    model.zero_grad()
    mean = sum(original(model, batch) for batch in batches) / (labels or 1)
    mean.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert row["loss"] == pytest.approx(mean.item(), rel=1e-5) and row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert (row["loss"] > 0) == (labels > 0) == (row["grad_norm"] > 0)
