"""Steps that are no number are left out, spikes go back, memory that runs out is told; with one rank here, with two in tests/launch."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import losses_of, write_config
from vlm_dist import load_config, train
from vlm_dist.config import HealthConfig
from vlm_dist.distributed import Ranks
from vlm_dist.errors import MachineError
from vlm_dist.run_dir import RunDir, read_jsonl
from vlm_dist.training import train as loop
from vlm_dist.training.health import DivergedError, Health
from vlm_dist.training.watchdog import Watchdog

pytestmark = pytest.mark.slow


@pytest.fixture
def run(settings, tmp_path):
    settings["data"]["heldout"] = []

    def start(*overrides: str) -> tuple[dict, Path]:
        summary = train(load_config(write_config(settings, tmp_path), overrides))
        return summary, Path(settings["output_dir"]) / settings["name"]

    return start


def spoil(monkeypatch, calls: set[int], factor: float) -> None:
    """Multiply the loss of these forward passes (numbered from 1)."""
    original, count = loop.summed_loss, 0

    def spoiled(*arguments):
        nonlocal count
        count += 1
        return original(*arguments) * (factor if count in calls else 1.0)

    monkeypatch.setattr(loop, "summed_loss", spoiled)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_no_number_is_left_out(run, monkeypatch, stage, factor):
    """The first of the two micro-batches of step 2 has no finite loss: no update, its samples named, and the rest goes on."""
    spoil(monkeypatch, {3}, factor)
    summary, folder = run(f"engine.zero_stage={stage}")
    assert summary["ended"] == "finished" and summary["step"] == 4 and summary["skipped_steps"] == 1 and 0 < summary["goodput"] < 1
    losses = losses_of(folder)
    assert losses[1] is None and all(loss > 0 for loss in losses[:1] + losses[2:])
    (event,) = [row for row in read_jsonl(folder / "events.jsonl") if row["event"] == "skipped"]
    assert event["step"] == 2 and len(event["samples"]) == 2
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values()) and any(tensor.any() for tensor in weights.values())


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_left_out_changes_nothing(run, monkeypatch, stage):
    """Weights and moments after a spoiled step are those before it."""
    spoil(monkeypatch, {3, 4}, float("nan"))
    _, folder = run(f"engine.zero_stage={stage}", "training.steps=2", "checkpoint.save_every=1")
    from safetensors.torch import load_file

    for name in ("adapter_model", "optimizer"):
        before, after = (load_file(folder / "checkpoints" / f"step-0000000{step}" / f"{name}.safetensors") for step in (1, 2))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_resuming_after_a_step_left_out(run, monkeypatch, settings):
    """The optimizer's count of updates is put back too: the losses go on as they did."""
    import shutil

    spoil(monkeypatch, {1, 2}, float("nan"))
    _, folder = run()
    expected = losses_of(folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    (folder / "summary.json").unlink()
    run("engine.zero_stage=1")
    assert expected[0] is None and losses_of(folder)[1:] == pytest.approx(expected[1:], rel=1e-5)


def test_too_many_in_a_row_end_the_run(run, monkeypatch):
    spoil(monkeypatch, set(range(5, 99)), float("nan"))
    with pytest.raises(DivergedError, match=r"step 6 is the 4\. in a row .*health\.max_skipped=3"):
        run("training.steps=20", "health.max_skipped=3")


def test_a_spike_goes_back_to_the_last_checkpoint(run, monkeypatch):
    """Steps 17 to 20 are spoiled beyond repair; the loss of step 20 jumps, and the run goes back to step 16 and uses other samples."""
    spoil(monkeypatch, {39, 40}, 1000.0)
    options = ["training.steps=24", "checkpoint.save_every=8", "health.on_spike=rollback", "optim.schedule=constant"]
    summary, folder = run(*options)
    assert summary["ended"] == "finished" and summary["step"] == 24 and summary["rollbacks"] == 1 and summary["data_step"] == 28
    events = {row["event"]: row for row in read_jsonl(folder / "events.jsonl")}
    assert events["spike"]["step"] == 20 and events["rollback"]["to"] == 16
    assert len(losses_of(folder)) == 24 and max(losses_of(folder)) < 20
    state = json.loads((folder / "checkpoints" / "step-00000024" / "state.json").read_text())
    assert state["data"]["step"] == 28 and state["health"]["rollbacks"] == 1


def test_spikes_without_end(run, monkeypatch):
    spoil(monkeypatch, set(range(37, 999)), 1000.0)
    with pytest.raises(DivergedError, match="after 1 rollbacks"):
        run("training.steps=40", "checkpoint.save_every=4", "health.on_spike=rollback", "health.max_rollbacks=1")


def test_a_spike_before_the_first_checkpoint_and_a_loss_that_stays_high(run, monkeypatch):
    """Nothing to go back to: told, and no rollback is counted; and the median follows, so that it is not told for ever."""
    spoil(monkeypatch, set(range(37, 999)), 1000.0)
    summary, folder = run("training.steps=60", "checkpoint.save_every=0", "health.on_spike=rollback", "health.max_rollbacks=0")
    told = [row["step"] for row in read_jsonl(folder / "events.jsonl") if row["event"] == "spike"]
    assert summary["rollbacks"] == 0 and summary["step"] == 60 and told[0] == 19 and told[-1] < 45


def test_a_hung_rank_is_the_one_that_is_behind(tmp_path):
    """By step first: what ranks did in earlier steps, such as batches of an evaluation, does not count."""
    run = RunDir(tmp_path)
    dogs = [Watchdog(run, Ranks(rank, rank, 3, torch.device("cpu")), 50.0, time.monotonic()) for rank in range(3)]
    run.beat(0).parent.mkdir()
    for rank, dog in enumerate(dogs):
        for _ in range(10 * rank):
            dog.beat("evaluating")
        dog.beat("reading", 7)
        if rank != 1:
            dog.beat("computing")
        dog._write()
    others = dogs[0]._others()
    assert [rank["rank"] for rank in dogs[0]._behind(others)] == [1] and dogs[0]._silent(others) == []
    assert dogs[1]._behind(dogs[1]._others()) == []
    os.utime(run.beat(2), (0, 0))
    assert [rank["rank"] for rank in dogs[0]._silent(dogs[0]._others())] == [2]


def test_memory_that_runs_out_is_told_with_what_to_change(run, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(loop, "summed_loss", full)
    with pytest.raises(MachineError, match=r"Tried to allocate 2.00 GiB\). Try, in this order: training.micro_batch=1; model.grad"):
        run()


class Told:
    def __init__(self):
        self.events = []

    def event(self, kind, step, text, **details):
        self.events.append((kind, step, details))


def test_a_slow_rank_is_named():
    log = Told()
    health = Health(HealthConfig(), log, None)  # pyright: ignore[reportArgumentType]
    for step in range(1, 60):
        health.watch_speed(step, [0.1, 0.1, 0.1 if step < 30 else 0.3, 0.11])
    assert [(kind, details["rank"]) for kind, _, details in log.events] == [("slow rank", 2)] and 30 < log.events[0][1] < 45
    for step in range(60, 100):
        health.watch_speed(step, [0.5])  # alone: nobody to compare with
    assert len(log.events) == 1
