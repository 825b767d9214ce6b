"""Every call on a file that a save makes, in turn the last of its process, or failing: what is there before or after it is whole."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def ends() -> Iterator[dict]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:  # flushing costs nothing there
        yield ends_of_all(Path(folder))


def ends_of_all(folder: Path) -> dict:
    layer = folder / "calls.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(layer), str(Path(__file__).with_name("calls.c")), "-ldl"], check=True)
    environment = child_environment(FAULTY_FOLDER=str(folder / "checkpoints"), LD_PRELOAD=str(layer))
    words = [sys.executable, "-m", "tests.faults.each_call"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_all_calls_were_reached(ends):
    """A save of five files, flushed and renamed, the addition of its scores, and the deletion of the oldest."""
    assert ends["calls"] > 60


def test_a_kill_at_each(ends):
    assert ends["ends"]["kill"] == {"-9": ends["calls"]}


@pytest.mark.parametrize("kind", ["disk full", "input/output error"])
def test_an_error_at_each(ends, kind):
    """Told in one line; where only the deletion of the oldest fails, or the closing of what is only read, the save is good."""
    assert set(ends["ends"][kind]) == {"0", "5"} and ends["ends"][kind]["5"] > ends["calls"] / 2
