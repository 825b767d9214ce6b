"""The page of a run of very many steps: bounded, its extremes kept, its means and totals exact, and said so."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from vlm_dist.cli.main import main
from vlm_dist.reporting import thinning
from vlm_dist.reporting.compare import write_comparison
from vlm_dist.reporting.report import write_report
from vlm_dist.reporting.thinning import MOST_GROUPS, Metrics, extremes

STEPS = 20_000
SPIKES = {777: 40.0, 12_345: 90.0, 19_999: 0.001}


def row(step: int, **more: Any) -> dict[str, Any]:
    draw = random.Random(step)
    return {
        "step": step, "loss": SPIKES.get(step, 2 + draw.random()), "lr": 1e-3, "grad_norm": 1 + draw.random(), "samples": 4 * step,
        "tokens": 100 * step, "tokens_per_s": 50.0, "step_s": 0.5 + draw.random(), "data_wait_s": 0.1, "padding_fraction": 0.25,
        "peak_memory_bytes": 2**30 + (step == 4_321) * 2**31, "busy_s": {"mean": 0.4, "max": 0.4 + draw.random(), "slowest_rank": 1},
        "loss_by_dataset": {"a": 2.0, "b": None if step % 2 else 1.0}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """A run of very many steps, two of which were left out."""
    run = tmp_path_factory.mktemp("runs") / "long"
    run.mkdir()
    (run / "config.yaml").write_text(
        "name: long\noutput_dir: x\nmodel: {name: m}\ndata: {train: x}\ntraining: {steps: 1, global_batch: 1}\n"
    )
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, STEPS + 1):
            nothing = {"loss": None, "grad_norm": None} if step in (5, 15_000) else {}
            file.write(json.dumps(row(step, **nothing)) + "\n")
        score = {"exact_match": 0.5, "samples": 4, "by_kind": {"colour": 0.5}}
        file.write(json.dumps({"step": STEPS, "phase": "after", "eval": score}) + "\n")
    return run


def test_what_is_kept(long):
    metrics = Metrics(long / "metrics.jsonl").update()
    rows = [row(step) for step in range(1, STEPS + 1)]
    assert metrics.count == STEPS and metrics.width == 32 and len(metrics.groups) == STEPS // 32 <= 2 * MOST_GROUPS
    assert len(metrics.rows) < STEPS / 1.5 and [one["step"] for one in metrics.rows] == sorted(one["step"] for one in metrics.rows)
    kept = {one["step"]: one for one in metrics.rows}
    assert all(kept[step]["loss"] == loss for step, loss in SPIKES.items()) and kept[4_321]["peak_memory_bytes"] == metrics.peak_bytes
    assert metrics.seconds == pytest.approx(sum(one["step_s"] for one in rows)) and metrics.last["step"] == STEPS
    for number in (0, 24, len(metrics.groups) - 1):
        group = [one for one in rows[32 * number : 32 * number + 32] if one["step"] not in (5, 15_000)]
        mean = metrics.means[number]
        assert mean["loss"] == pytest.approx(sum(one["loss"] for one in group) / len(group))
        assert mean["busy_s"]["max"] == pytest.approx(sum(one["busy_s"]["max"] for one in rows[32 * number : 32 * number + 32]) / 32)
        for end in (min, max):
            assert end(one["loss"] for one in group) in {one["loss"] for one in metrics.groups[number].rows.values()}


def test_the_page_is_small_and_says_so(long, tmp_path):
    page = write_report(long).read_text()
    assert "Of 20,000 steps each curve goes through the lowest and the highest value of every 32" in page
    assert len(page) < 2_000_000 and all(path.count("L ") <= 4 * MOST_GROUPS for path in re.findall(r' d="([^"]*)"', page))
    assert "<dd>20,000</dd>" in page and f"{2_000_000 / Metrics(long / 'metrics.jsonl').update().seconds:,.0f}" in page
    compared = write_comparison([long, long], tmp_path / "compared.html").read_text()
    assert "long: Of 20,000 steps each curve" in compared.replace("runs/long", "long")


def test_only_what_is_new_is_read(long, monkeypatch):
    read: list[bytes] = []
    monkeypatch.setattr(thinning, "json_row", lambda line, real=thinning.json_row: read.append(line) or real(line))
    metrics, path = Metrics(long / "metrics.jsonl").update(), long / "metrics.jsonl"
    before, found = path.read_bytes(), metrics.rows
    assert len(read) == STEPS + 2  # and what is behind the last line
    try:
        with path.open("a") as file:
            file.write(json.dumps(row(STEPS + 1)) + "\n" + json.dumps(row(STEPS + 2))[:40])
        assert metrics.update().count == STEPS + 1 and len(read) == STEPS + 4
        with path.open("a") as file:
            file.write(json.dumps(row(STEPS + 2))[40:])
        assert metrics.update().count == STEPS + 2
        path.with_name("other").write_bytes(before)
        path.with_name("other").replace(path)  # as a rollback writes it
        assert metrics.update().count == STEPS and metrics.rows == found
    finally:
        path.write_bytes(before)


def test_lines_that_are_no_steps_are_told_and_passed_over(tmp_path):
    run = tmp_path / "runs" / "odd"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: odd\n")
    lacking = row(2)
    del lacking["step_s"]
    lines = [row(1), lacking, {**row(3), "loss": "low"}, {"step": 3, "phase": "after", "eval": {}}, [], row(4)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text + "garbage\n\n" + json.dumps(row(5)))
    page = write_report(run).read_text()
    assert "5 lines of metrics.jsonl hold neither a whole step nor an evaluation" in page and "<dd>5</dd>" in page
    (run / "metrics.jsonl").write_text(json.dumps(lacking) + "\n")
    assert main(["report", str(run)]) == 2
    (run / "metrics.jsonl").write_text(json.dumps({**row(1), "loss": None, "grad_norm": None, "step_s": 0}) + "\n")
    assert "<svg" in write_report(run).read_text()  # nothing but steps that were left out, in no time


def test_the_extremes_of_a_curve():
    y = [float(step % 7) for step in range(10_000)]
    y[3_333], y[8_000] = 99.0, -99.0
    at, kept = extremes(list(range(10_000)), y, 100)
    assert len(at) <= 400 and at == sorted(set(at)) and (at[0], at[-1]) == (0, 9_999)
    assert {99.0, -99.0} <= set(kept) and all(y[place] == value for place, value in zip(at, kept, strict=True))
    assert extremes([1.0, 2.0], [3.0, 4.0]) == ([1.0, 2.0], [3.0, 4.0])
