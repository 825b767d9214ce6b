"""Every exit code that the code gives is in the table of docs/training.md, every code of the table is given, and a test meets it."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT, child_environment, write_config
from vlm_dist.cli.main import main
from vlm_dist.training import outcome
from vlm_dist.training.health import ASKS_TO_STOP

MET = {  # what a test asserts of each; the others are met below
    2: ("faults/test_run_folder.py", "2"),
    3: ("data/test_odd_data.py", "DataError.exit_code"),
    4: ("training/test_bad_input.py", "4"),
    5: ("faults/test_full_disk.py", "5"),
    6: ("faults/test_run_folder.py", "6"),
    7: ("training/test_bad_input.py", "7"),
    8: ("faults/test_ranks.py", "8"),
    141: ("faults/test_full_disk.py", "141"),
}
HERE = {0, 1, *(128 + number for number in ASKS_TO_STOP)}


def documented() -> set[int]:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d, ]+) \|", page.partition("| code | ended by |")[2].partition("\n\n")[0], flags=re.MULTILINE)
    return {int(code) for row in rows for code in row.split(",")}


def given() -> set[int]:
    """Of errors, of what ends a process, of the command line, and of SLURM's script; Ray starts a worker that ends with 1 again."""
    script = (ROOT / "launch" / "slurm" / "train.sbatch").read_text()
    codes = {0, 1, *(128 + number for number in ASKS_TO_STOP), *map(int, re.findall(r"^ +exit (\d+)$", script, flags=re.MULTILINE))}
    for path in (ROOT / "vlm_dist").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            found = None
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("exit_code", "EXIT_CODE"):
                found = node.value
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("os._exit", "sys.exit") and node.args:
                found = node.args[0]
            elif isinstance(node, ast.Return) and path.parent.name == "cli" and path.stem == "main":
                found = node.value
            if isinstance(found, ast.Constant) and isinstance(found.value, int):
                codes.add(found.value)
    return codes


def test_the_table_is_what_the_code_gives():
    assert documented() == given() == {*MET, *HERE}


@pytest.mark.parametrize("code", MET)
def test_a_test_meets_each(code):
    file, words = MET[code]
    compared = {
        ast.unparse(right)
        for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq) and re.search(r"main\(|code", ast.unparse(node.left))
        for right in node.comparators
    }
    assert words in compared, f"tests/{file} compares no exit code with {words}"


@pytest.mark.parametrize("number", ASKS_TO_STOP)
def test_a_signal(settings, tmp_path, monkeypatch, number):
    """128 + its number, and the step is saved."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    step_metrics, settings["data"]["heldout"] = outcome.step_metrics, []

    def stopping(progress, *rest):
        if progress.step == 1:
            os.kill(os.getpid(), number)
        return step_metrics(progress, *rest)

    monkeypatch.setattr(outcome, "step_metrics", stopping)
    try:
        assert main(["train", str(write_config(settings, tmp_path)), "training.steps=9"]) == 128 + number
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [path.name for path in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_bug_shows_its_traceback():
    code = "from vlm_dist.cli.main import run_reporting; run_reporting(lambda: 1 // 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_environment(), check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr
