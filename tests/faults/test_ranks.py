"""A rank that is gone: one that is left says which, where, at which step, and what to do; with the exit codes of each launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, child_environment, losses_of, write_config
from tests.warm import warm_ranks
from vlm_dist.distributed import Ranks, free_port
from vlm_dist.run_dir import RunDir, write_json
from vlm_dist.training.lost import beat_of, born, is_dead, lost_rank

BIN = Path(sys.executable).parent
CLOSED = RuntimeError("[pair.cc:537] Read error [127.0.0.1]:25298: Connection reset by peer.")


def ranks_of(rank: int, world: int) -> Ranks:
    return Ranks(rank, rank, world, torch.device("cpu"))


@pytest.fixture
def run(tmp_path) -> RunDir:
    """Of three ranks that live in this process."""
    found = RunDir(tmp_path)
    for rank in range(3):
        write_json(found.beat(rank), beat_of(rank, time.time(), 7, "computing", 1))
    return found


def set_beat(run: RunDir, rank: int, **values: object) -> None:
    write_json(run.beat(rank), {**json.loads(run.beat(rank).read_text()), **values})


@pytest.fixture
def killed() -> subprocess.Popen:
    """A process that was killed and that nobody has waited for, as under a launcher."""
    process = subprocess.Popen(["sleep", "600"])
    process.born = born(process.pid)  # pyright: ignore[reportAttributeAccessIssue]
    process.kill()
    while born(process.pid):
        time.sleep(0.01)
    yield process
    process.wait()


def test_a_killed_rank_is_named_by_the_lowest_that_is_left(run, killed):
    set_beat(run, 0, pid=killed.pid, born=killed.born)
    told = {rank: lost_rank(run, ranks_of(rank, 3), CLOSED, 0.1) for rank in (1, 2)}
    assert told[1] is not None and told[2] is not None and not told[1].told and told[2].told and told[1].exit_code == 8
    words = str(told[1])
    assert f"rank 0 ({os.uname().nodename}, process {killed.pid}) is gone: it was killed" in words and "It was step 7" in words
    assert "to begin again: no checkpoint was saved yet" in words
    summary = json.loads(run.summary.read_text())
    assert summary["ended"] == "failed" and summary["reason"] == words


def test_where_a_checkpoint_is_left_it_is_named(run, killed):
    (run.checkpoints / "step-00000006").mkdir(parents=True)
    set_beat(run, 1, pid=killed.pid, born=killed.born)
    assert "to continue from step-00000006" in str(lost_rank(run, ranks_of(0, 3), CLOSED, 0.1))


def test_one_that_ended_by_itself_is_no_killed_one(run, killed):
    """The first that did, not those that followed it; and a killed one before all of them."""
    set_beat(run, 1, ended=True, now=10.0, pid=killed.pid, born=killed.born)
    set_beat(run, 2, ended=True, now=9.0)
    assert "rank 2" in (words := str(lost_rank(run, ranks_of(0, 3), CLOSED, 0.1))) and "ended by itself" in words and "rank 1" not in words
    set_beat(run, 1, ended=False)
    assert "rank 1" in (words := str(lost_rank(run, ranks_of(0, 3), CLOSED, 0.1))) and "is gone" in words


def test_of_another_machine_silence_tells(run):
    for rank in (1, 2):
        set_beat(run, rank, machine="another", host="far")
    os.utime(run.beat(2), (0, 0))
    os.utime(run.beat(1), (time.time() + 60, time.time() + 60))  # it goes on writing
    words = str(lost_rank(run, ranks_of(0, 3), CLOSED, -2.9))
    assert "rank 2 (far" in words and "rank 1" not in words


def test_numbers_of_another_container_say_nothing(run):
    """Same name, other processes: one may not be taken for dead."""
    set_beat(run, 1, machine="another", pid=2**22 - 1)
    assert not is_dead(json.loads(run.beat(1).read_text()))


def test_an_error_of_this_rank_stays_what_it_is(run):
    assert lost_rank(run, ranks_of(0, 3), RuntimeError("shape mismatch"), 0.1) is None
    assert lost_rank(run, ranks_of(0, 1), CLOSED, 0.1) is None
    set_beat(run, 1, ended=True, now=9.0)  # it had the same error
    assert lost_rank(run, ranks_of(0, 3), RuntimeError("shape mismatch"), 0.1) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"rank": 1}', "\x00"])
def test_a_garbage_file_of_a_rank_is_passed_over(run, killed, text):
    run.beat(1).write_text(text)
    set_beat(run, 2, pid=killed.pid, born=killed.born)
    words = str(lost_rank(run, ranks_of(0, 3), CLOSED, 0.1))
    assert "rank 2" in words and "rank 1" not in words


def wait_for_steps(folder: Path, steps: int) -> None:
    """Until so many are done, and a checkpoint is whole, which is written beside them."""
    deadline = time.monotonic() + 240
    while not (any(folder.glob("checkpoints/step-*/MANIFEST.json")) and len(losses_of(folder)) >= steps):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def config(settings, tmp_path) -> str:
    settings["data"]["heldout"] = []
    settings["training"] = {"steps": 5000, "global_batch": 4, "micro_batch": 2}
    return str(write_config(settings, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_two_ranks_without_a_launcher(config, tmp_path, victim):
    """What is left ends by exit code 8, with one line and no traceback."""
    processes = warm_ranks(2, str(ROOT / "launch" / "train.py"), "--config", config, environment=child_environment())
    folder = tmp_path / "runs" / "tiny"
    wait_for_steps(folder, 3)
    processes[victim].send_signal(signal.SIGKILL)
    out, _ = processes[1 - victim].communicate(90)
    assert processes[1 - victim].returncode == 8, out
    lines = [line for line in out.splitlines() if line.startswith("vlm-dist: ")]
    assert len(lines) == 1 and f"rank {victim} (" in lines[0] and f"process {processes[victim].pid}" in lines[0], out
    assert "to continue from step-" in lines[0] and "Traceback" not in out
    assert json.loads((folder / "summary.json").read_text())["reason"] == lines[0].removeprefix("vlm-dist: ")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("launcher", "code"), [("torchrun", 1), ("deepspeed", 247)])
def test_each_launcher(config, tmp_path, launcher, code):
    """The line of the rank that is left comes before what the launcher says; the exit code is the launcher's own."""
    head = {
        "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2"],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())],
    }[launcher]
    words = [str(BIN / head[0]), *head[1:], str(ROOT / "launch" / "train.py"), "--config", config]
    environment = child_environment(PATH=f"{BIN}:{os.environ['PATH']}", PYTHONUNBUFFERED="1")
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env=environment, start_new_session=True)
    folder = tmp_path / "runs" / "tiny"
    wait_for_steps(folder, 3)
    victim = json.loads((folder / "logs" / "rank-1.alive.json").read_text())["pid"]
    os.kill(victim, signal.SIGKILL)
    assert process.wait(120) == code
    said = (tmp_path / "out").read_text()
    lines = [line for line in said.splitlines() if "vlm-dist: " in line]
    assert len(lines) == 1 and f"rank 1 ({os.uname().nodename}, process {victim}) is gone" in lines[0], said
    assert "Connection" not in said and "_run_loop" not in said
