"""The ruler: what counts as a launch and as a wait; and what five families launch, move, keep and wait for, which may only fall."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, child_environment, write_config
from vlm_dist.cli.main import main
from vlm_dist.planning.profile import by
from vlm_dist.planning.shapes import counting

PINNED = Path(__file__).with_name("pinned.json")


def names_of(count) -> dict[str, int]:
    found: dict[str, int] = {}
    for one, number in count.work.items():
        found[one.name] = found.get(one.name, 0) + number
    return found


def test_only_what_launches_work_counts():
    with counting(on_gpu=True) as shapes:
        x = torch.empty(4, 8)
        shapes.count.mark()
        y = x.device, x.view(8, 4), torch.empty_like(x), x.detach(), x.new_empty(3), x.t()
        assert not shapes.count.work and y
        z = x @ x.t()
        assert names_of(shapes.count) == {"mm": 1} and shapes.count.flops == 2 * 4 * 4 * 8
        assert shapes.count.moved == 4 * (4 * 8 + 4 * 8 + 4 * 4)
        z.add_(1)
        assert names_of(shapes.count) == {"mm": 1, "add_": 1}


def test_waits_for_the_device():
    with counting(on_gpu=True) as shapes:
        numbers, mask = torch.arange(6), torch.tensor([True, False, True, False, False, True])
        x = torch.empty(6, 3)
        shapes.count.mark()
        numbers.tolist(), numbers.sum().item(), mask.nonzero(), x[mask], numbers.unique()
        assert sum(shapes.count.waits.values()) >= 5, shapes.count.waits
        before = sum(shapes.count.waits.values())
        x[numbers], x + 1, torch.repeat_interleave(numbers, numbers, output_size=15)
        assert sum(shapes.count.waits.values()) == before


@pytest.mark.slow
def test_the_command(settings, tmp_path, capsys):
    config = str(write_config(settings, tmp_path))
    assert main(["plan", config, "--gpu", "h100", "--profile", "--against", "off", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    mine, other = plan["profile"], plan["against"]
    assert {"launches", "moved_bytes", "roofline_ms", "limit_ms", "kept_bytes", "device_waits", "rows"} <= mine.keys()
    assert mine["launches"] == sum(row["launches"] for row in mine["rows"]) < other["launches"] and other["kernels"] == "off"
    assert mine["moved_bytes"] == sum(row["moved_bytes"] for row in mine["rows"])
    assert mine["roofline_ms"] == pytest.approx(sum(row["roofline_ms"] for row in mine["rows"]), abs=0.01)
    assert sum(mine["kept_bytes"]["parts"].values()) > 0 and mine["kept_bytes"]["language_token_layer"] > 0
    parts = by(mine["rows"], "part")
    assert {"vision attention", "vision MLP", "projector", "language attention", "language MLP", "head, loss and rest"} <= parts.keys()
    assert main(["plan", config, "--gpu", "h100", "--profile", "--against", "off"]) == 0
    shown = capsys.readouterr().out
    assert "operations launched" in shown and "language MLP" in shown and "kernels off" in shown


@pytest.mark.parametrize("words", [["--auto", "--profile"], ["--against", "off"]])
def test_what_does_not_go_together(settings, tmp_path, capsys, words):
    assert main(["plan", str(write_config(settings, tmp_path)), *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def costs(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    command = [sys.executable, "-m", "tests.planning.costs", str(path)]
    told = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=600, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    return json.loads(path.read_text())


@pytest.mark.slow
def test_what_a_micro_batch_costs_can_only_fall(costs):
    """Of tiny models with NF4 and adapters, on rows of pictures and text."""
    pinned = json.loads(PINNED.read_text())
    assert costs.keys() == pinned.keys()
    more = {name: (now, pinned[name]) for name, now in costs.items() if any(now[key] > pinned[name][key] for key in now)}
    assert not more, f"now, and pinned: {more}"
