"""Signals in each phase: what is due is saved first, an evaluation is left between its batches, and the words say what was saved."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import child_environment, command, losses_of, write_config
from vlm_dist import load_config, train
from vlm_dist.checkpoints.form import find_checkpoints, read_state, verify_checkpoint
from vlm_dist.cli.main import main
from vlm_dist.run_dir import read_jsonl
from vlm_dist.scoring import evaluate as scoring
from vlm_dist.training.health import StopRequest
from vlm_dist.training.progress import interrupted_in_words


@pytest.fixture(autouse=True)
def hangup_is_heard():
    """Also where the tests themselves run under nohup, which has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def folder_of(settings: dict) -> Path:
    return Path(settings["output_dir"]) / settings["name"]


def newest(settings: dict) -> Path:
    return find_checkpoints(folder_of(settings) / "checkpoints")[0]


@pytest.fixture
def evaluating(settings, tmp_path, monkeypatch):
    """Start a run with evaluations of several batches; `batches` counts those that were answered, and `at` is where a signal comes."""
    settings["evaluation"] = {"every": 2, "samples": 4, "batch_size": 1, "max_new_tokens": 2, "patience": 9, "without_pictures": False}
    generate, state = scoring.generate, {"batches": 0, "at": 0, "signal": signal.SIGTERM}

    def counted(*arguments, **options):
        state["batches"] += 1
        if state["batches"] == state["at"]:
            os.kill(os.getpid(), state["signal"])
        return generate(*arguments, **options)

    monkeypatch.setattr(scoring, "generate", counted)

    def start(at: int = 0, number: int = signal.SIGTERM) -> dict:
        state.update(batches=0, at=at, signal=number)
        return train(load_config(write_config(settings, tmp_path))) | {"batches": state["batches"]}

    return start


def test_a_signal_in_an_evaluation_ends_it_with_the_checkpoint_that_was_due(evaluating, settings):
    """Step 2 is saved before it is evaluated; the evaluation is left after the batch; going on, it is made first, and the run has the
    losses, scores and answers of one that nothing ended."""
    settings["name"] = "whole"
    evaluating()
    settings["name"] = "stopped"
    stopped = evaluating(at=4 + 2)
    assert stopped["ended"] == "interrupted" and stopped["step"] == 2 and stopped["batches"] == 6  # before: 4, during: 2
    state = read_state(newest(settings))
    assert state["step"] == 2 and state["owes"] == "evaluation" and state["scores"] is None
    finished = evaluating()
    assert finished["ended"] == "finished" and finished["batches"] == 4 + 4  # during step 2, after
    whole, again = (folder_of({**settings, "name": name}) for name in ("whole", "stopped"))
    assert losses_of(again) == pytest.approx(losses_of(whole), rel=1e-6)
    for run in (whole, again):
        during = [row for row in read_jsonl(run / "metrics.jsonl") if row.get("phase") == "during"]
        assert [row["step"] for row in during] == [2]
    step = "checkpoints/step-00000002"
    assert read_state(again / step)["scores"] == read_state(whole / step)["scores"] is not None
    assert (
        read_state(again / step)["patience"]
        == read_state(whole / step)["patience"]
        == {"best": read_state(whole / step)["scores"]["exact_match"], "since": 0}
    )
    assert "owes" not in read_state(whole / step) and verify_checkpoint(whole / step) is None
    assert [row["answer"] for row in read_jsonl(again / "samples" / "after.jsonl")] == [
        row["answer"] for row in read_jsonl(whole / "samples" / "after.jsonl")
    ]


def test_scores_that_a_kill_kept_from_the_checkpoint_are_not_made_twice(evaluating, settings, monkeypatch):
    from vlm_dist.checkpoints.saver import Saver

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "amend", killed)
        with pytest.raises(Killed):
            evaluating()
    assert read_state(newest(settings))["owes"] == "evaluation"
    assert evaluating()["batches"] == 4  # after training only
    assert [row["step"] for row in read_jsonl(folder_of(settings) / "metrics.jsonl") if row.get("phase") == "during"] == [2]
    assert read_state(folder_of(settings) / "checkpoints" / "step-00000002")["scores"]["samples"] == 4


def test_a_signal_in_the_last_evaluation_keeps_the_training(evaluating, settings):
    stopped = evaluating(at=4 + 4 + 1)
    assert stopped["ended"] == "interrupted" and stopped["step"] == 4 and newest(settings).name == "step-00000004"
    losses = losses_of(folder_of(settings))
    finished = evaluating()
    assert finished["ended"] == "finished" and finished["batches"] == 4 and losses_of(folder_of(settings)) == losses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1])
def test_before_the_first_step_nothing_is_said_to_be_saved(evaluating, settings, tmp_path, capsys, number):
    stopped = evaluating(at=1, number=number)
    assert stopped["ended"] == "interrupted" and stopped["step"] == 0 and stopped["signal"] == signal.Signals(number).name
    out = capsys.readouterr().out
    assert f"interrupted by {signal.Signals(number).name} before the first step; there is nothing to save yet" in out and "saved" not in out
    assert not (folder_of(settings) / "checkpoints").exists() and not (folder_of(settings) / "samples" / "before.jsonl").exists()


def test_the_words_after_a_stop():
    assert interrupted_in_words(3, None, 30) == "after step 3; saved. Run the same command again to continue"
    assert interrupted_in_words(3, 29.0, 30) == interrupted_in_words(3, None, 30)
    assert "saved, 41 s after it, later than checkpoint.grace_s=30" in interrupted_in_words(3, 41.0, 30)


def test_a_run_that_cannot_keep_the_grace_period_says_so_once(settings, tmp_path):
    settings["data"]["heldout"] = []
    settings["checkpoint"] = {"save_every": 1, "grace_s": 1e-3}
    train(load_config(write_config(settings, tmp_path)))
    (event,) = [row for row in read_jsonl(folder_of(settings) / "events.jsonl") if row["event"] == "grace"]
    assert "but checkpoint.grace_s is 0.001" in event["text"] and event["step"] >= 2


def test_hangup_under_nohup_stays_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested and stop.seconds is None
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == signal.SIGHUP and (stop.seconds or 0) >= 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_terminal_that_is_closed(settings, tmp_path):
    """A real one: SIGHUP, and every write to it fails. The run saves, leaves by 129, and goes on."""
    settings["data"]["heldout"] = []
    settings["training"]["steps"], settings["checkpoint"] = 5000, {"save_every": 0}
    config = str(write_config(settings, tmp_path))
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    environment = child_environment(TERM="xterm")
    process = subprocess.Popen(
        command("train", config), stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=take_terminal
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    deadline, metrics = time.monotonic() + 300, folder_of(settings) / "metrics.jsonl"
    while not (metrics.exists() and len(losses_of(folder_of(settings))) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        try:
            os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.05)
    os.close(ours)
    assert process.wait(120) == 128 + signal.SIGHUP
    summary = json.loads((folder_of(settings) / "summary.json").read_text())
    assert summary["ended"] == "interrupted" and summary["signal"] == "SIGHUP" and summary["step"] >= 3
    assert read_state(newest(settings))["step"] == summary["step"]


def test_the_setting_is_known(settings, tmp_path, capsys):
    assert main(["config", "--explain"]) == 0
    assert "grace_s" in capsys.readouterr().out
