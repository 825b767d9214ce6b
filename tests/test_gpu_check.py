"""scripts/gpu_check.sh goes through all its parts without a GPU, so that it runs where there is one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, child_environment
from vlm_dist.config_load import parse_config

PARTS = ("machine", "tested", "tiny", "profiled", "memory", "speed", "pieces", "several")


def check(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    environment = child_environment(PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    command = [str(ROOT / "scripts" / "gpu_check.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout, check=False)


def dry_run(folder, names=PARTS) -> dict[str, dict]:
    """What each part wrote; none found anything wrong."""
    result = check("--dry-run", "--out", str(folder), "--parts", *names, timeout=900)
    parts = {part: json.loads((folder / f"{part}.json").read_text()) for part in names}
    wrong = [(part, one) for part, content in parts.items() for one in content["checks"] if one["verdict"] == "wrong"]
    assert not wrong and result.returncode == 0, (wrong, result.stderr[-2000:])
    assert all(content["dry_run"] and content["machine"]["versions"]["torch"] and content["command"] for content in parts.values())
    return parts


@pytest.mark.slow
def test_dry_run_of_what_measures(tmp_path):
    parts = dry_run(tmp_path, ("profiled", "speed", "pieces"))
    assert parts["profiled"]["results"]["profile"]["attention"] and parts["pieces"]["results"]["kernels"]["results"]
    assert "ours, kernels auto, 4 samples in a row" in parts["speed"]["results"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif("GPU_CHECK_DRY_RUN" not in os.environ, reason="takes four minutes; GPU_CHECK_DRY_RUN=1 runs it")
def test_dry_run(tmp_path):
    parts = dry_run(tmp_path)
    assert parts["tiny"]["results"]["losses"] and parts["several"]["checks"][1]["verdict"] == "right"
    again = check("--dry-run", "--out", str(tmp_path))
    assert again.returncode == 0 and again.stdout.count("done before") == len(PARTS)  # resumed: nothing is run twice


def test_a_part_that_died_is_told_and_run_again(tmp_path):
    (tmp_path / "several.json").write_text("{")  # cut off while it was written
    first = check("--dry-run", "--out", str(tmp_path), "--parts", "nothing")
    assert first.returncode == 2 and "invalid choice: 'nothing'" in first.stderr
    (tmp_path / "machine.json").write_text(json.dumps({"part": "machine", "failed": True, "seconds": 1, "checks": []}))
    result = check("--dry-run", "--out", str(tmp_path), "--parts", "machine")
    assert "done before" not in result.stdout and "failed" not in json.loads((tmp_path / "machine.json").read_text())


def test_what_was_found_without_a_card_is_not_taken_for_the_cards(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "gpu_check"))
    run = importlib.import_module("run")
    path = tmp_path / "speed.json"
    for content, done in (({"dry_run": False}, True), ({"dry_run": True}, False), ({"dry_run": False, "unfinished": True}, False)):
        path.write_text(json.dumps({"checks": [], **content}))
        assert run.is_done(path, False) is done
    run._told_as_unfinished("speed", path, "stopped after 255 s", 255.0)
    told = json.loads(path.read_text())
    assert told["failed"] and told["checks"][-1]["found"] == "did not come to its end: stopped after 255 s"


def test_every_case_of_the_tiny_part_is_a_configuration(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "gpu_check"))
    tiny = importlib.import_module("tiny")
    (tmp_path / "data").mkdir()
    for split in ("train", "heldout"):
        (tmp_path / "data" / f"{split}.tar").touch()
    cases = list(tiny.cases(False))
    assert {option for *_, option in cases} == set(tiny.OPTIONS)
    for number, case in enumerate(cases):
        parse_config(json.dumps(tiny.settings(tmp_path, case, f"case-{number}")))


def test_without_a_gpu_it_says_so():
    result = check()
    assert result.returncode == 2 and "nvidia-smi names no GPU here; --dry-run" in result.stderr
