"""The run directory: held by one, claimed late, and never in the way of the next start, whatever became of the files in it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import child_environment, write_config
from vlm_dist.cli.main import main
from vlm_dist.config_load import load_config
from vlm_dist.disk import cannot_go_on, is_of_disk, remedy, why
from vlm_dist.distributed import alone
from vlm_dist.errors import CheckpointError, ConfigError, MachineError
from vlm_dist.run_dir import RunDir, read_json, read_jsonl
from vlm_dist.run_lock import EXIT_CODE, RunLock
from vlm_dist.run_mend import mend
from vlm_dist.training.log import events_until, missing
from vlm_dist.training.start import begin

NOBODY = 65534
HOLD = """
import sys, time
from pathlib import Path
from vlm_dist.run_dir import RunDir
from vlm_dist.run_lock import RunLock
lock = RunLock(RunDir(Path(sys.argv[1])), beat_s=0.1, dead_s=1, use_flock=sys.argv[2] == "flock")
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def hold(folder: Path, how: str = "flock") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment()
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("how", ["flock", "no flock"])
def test_second_start_is_refused_by_name_and_a_killed_owner_holds_nothing(how, tmp_path):
    owner = hold(tmp_path, how)
    try:
        with pytest.raises(ConfigError, match=rf"process {owner.pid} on {os.uname().nodename}, since 20\d\d-.*trains there now"):
            RunLock(RunDir(tmp_path), use_flock=how == "flock").acquire()
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    start = time.monotonic()
    lock = RunLock(RunDir(tmp_path), use_flock=how == "flock")
    lock.acquire()
    assert time.monotonic() - start < 30  # of the 60 s after which an owner counts as dead
    lock.release()
    assert RunDir(tmp_path).lock.read_bytes() == b""


def _elsewhere(folder: Path, age_s: float) -> Path:
    path = RunDir(folder).lock
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": "node-7", "boot": "b", "space": "s", "pid": 42, "born": "1", "token": "t", "since": 1_700_000_000}))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_owner_on_another_machine_is_waited_for_as_long_as_its_age_asks(tmp_path, capsys):
    _elsewhere(tmp_path, age_s=100)
    lock = RunLock(RunDir(tmp_path), beat_s=0.1, dead_s=1)
    lock.acquire()  # at once
    lock.release()
    assert capsys.readouterr().err == ""

    _elsewhere(tmp_path, age_s=0)
    start = time.monotonic()
    lock = RunLock(RunDir(tmp_path), beat_s=0.1, dead_s=1)
    lock.acquire()
    assert time.monotonic() - start > 0.5
    lock.release()
    assert "process 42 on node-7" in capsys.readouterr().err


def test_owner_on_another_machine_that_lives_is_not_disturbed(tmp_path):
    path, ends = _elsewhere(tmp_path, age_s=0), threading.Event()

    def beat() -> None:
        while not ends.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="process 42 on node-7, since 2023-11-14"):
            RunLock(RunDir(tmp_path), beat_s=0.1, dead_s=5).acquire()
    finally:
        ends.set()
        thread.join()
    assert json.loads(path.read_bytes())["pid"] == 42


def test_owner_taken_for_dead_ends(tmp_path):
    owner = hold(tmp_path)
    _elsewhere(tmp_path, age_s=0)
    _, told = owner.communicate(timeout=20)
    assert owner.returncode == EXIT_CODE and "process 42 on node-7" in told and "has taken the run over" in told


@pytest.mark.parametrize("content", [b"", b"\0\0", b"{", b"[1]", b'{"host": 1}'])
def test_damaged_lock_is_not_in_the_way(content, tmp_path):
    path = RunDir(tmp_path).lock
    path.parent.mkdir()
    path.write_bytes(content)
    lock = RunLock(RunDir(tmp_path))
    lock.acquire()
    lock.release()


EVENT = {"step": 1, "event": "spike", "text": "t"}
GARBAGE = {
    "empty": b"",
    "cut": b'{"step": 1, "lo',
    "binary": b"\x80\xff\0\n",
    "no object": b"[1]\n5\n",
    "keys missing": b'{"a": 1}\n',
    "deep": b"[" * 10**5,
}


@pytest.mark.parametrize("what", GARBAGE)
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "events.jsonl", "quarantine.jsonl", "logs/starts.jsonl", "summary.json", "logs/rank-0.alive.json"]
)
def test_helper_files_never_block(name, what, tmp_path):
    told, run = [], RunDir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(GARBAGE[what])
    mend(run, told.append)
    assert len(told) <= 1 and all(str(path) in line and "\n" not in line for line in told)
    kept = list(path.parent.glob(f"{path.name}.damaged-*"))
    assert len(kept) == len(told) and all(one.read_bytes() == GARBAGE[what] for one in kept)
    assert told or what in ("empty", "cut", "deep")  # of lines, a last one that was cut off is what a kill leaves
    assert read_jsonl(path) == [] if name.endswith("jsonl") else not path.exists()
    mend(run, told.append)
    assert len(told) <= 1


def test_bad_line_alone_is_left_out(tmp_path):
    run, told = RunDir(tmp_path), []
    rows = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    lines = content.splitlines(keepends=True)
    run.metrics.write_bytes(lines[0] + b"\xff garbage\n" + lines[1] + lines[2] + b'{"step": 4, "lo')
    before = run.metrics.read_bytes()
    assert read_jsonl(run.metrics) == rows
    mend(run, told.append)
    assert run.metrics.read_bytes() == content
    assert told == [f"{run.metrics}: line 2 cannot be read and is left out; the file as it was is kept as metrics.jsonl.damaged-1"]
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == before


def test_a_line_may_hold_any_letter(tmp_path):
    row = {"text": "a\u2028b\x85c\x0bd"}  # what str.splitlines takes for line ends
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert read_jsonl(tmp_path / "a.jsonl") == [row]


def test_what_cannot_be_read_is_passed_over(tmp_path):
    (tmp_path / "folder").mkdir()
    assert read_json(tmp_path / "folder") is None and read_jsonl(tmp_path / "folder") == []
    told, run = [], RunDir(tmp_path)
    for path in (run.metrics, run.summary, run.beat(0)):
        path.mkdir(parents=True)
    (tmp_path / "samples").write_text("")
    mend(run, told.append)
    assert len(told) == 4 and not any(path.exists() for path in (run.metrics, run.summary, run.beat(0), run.samples))


def test_events_of_steps_that_are_done_again_go():
    def event(step: int, kind: str, **more) -> dict:
        return {"step": step, "event": kind, "text": "", **more}

    first = [event(1, "skipped"), event(2, "checkpoint"), event(3, "skipped")]
    assert events_until(first, 2) == first[:2]
    assert events_until(first, -1) == []
    late = [event(3, "skipped"), event(2, "checkpoint"), event(4, "spike")]  # the writing took until step 3
    assert events_until(late, 2) == [late[1]]
    rolled = [event(2, "checkpoint"), event(9, "spike"), event(9, "rollback", to=2), event(4, "checkpoint"), event(5, "spike")]
    assert events_until(rolled, 4) == rolled[:4]  # the rollback has happened before this checkpoint
    assert events_until(rolled, 2) == [rolled[0]]  # and after that one


def test_holes_are_told():
    assert missing({1, 2, 3}, 3) == "" == missing(set(), 0)
    assert missing({1, 3}, 3) == "step 2"
    assert missing({1}, 4) == "steps 2 to 4"
    assert missing({1, 3}, 4) == "2 steps between 2 and 4"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG])
def test_words_are_true(number, tmp_path):
    error = OSError(number, os.strerror(number), str(tmp_path / "x"))
    assert is_of_disk(error, tmp_path)
    told = str(cannot_go_on(tmp_path, error))
    assert "\n" not in told and why(error) in told and ("room" in told) == (number == errno.ENOSPC) == ("room" in remedy(error))
    assert not is_of_disk(OSError("a library says so"), tmp_path)
    assert not is_of_disk(ConnectionResetError(errno.ECONNRESET, "reset"), tmp_path)
    assert not is_of_disk(FileNotFoundError(errno.ENOENT, "no such file", "/elsewhere/y"), tmp_path)


def _broken_places(folder: Path) -> dict[str, str]:
    (folder / "file").write_text("")
    (folder / "link").symlink_to(folder / "nowhere")
    (folder / "circle").symlink_to(folder / "circle")
    return {
        "below a file": f"{folder}/file/runs",
        "is a file": f"{folder}/file",
        "dangling link": f"{folder}/link",
        "circle": f"{folder}/circle",
        "name too long": f"{folder}/{'x' * 300}",
        "path too long": f"{folder}/{'x/' * 3000}",
        "no place for files": "/proc/runs",
        "read-only": "/sys/kernel/runs",
    }


def test_output_dir_that_cannot_be_is_one_line(settings, tmp_path, capsys):
    for what, place in _broken_places(tmp_path).items():
        assert main(["train", str(write_config(settings | {"output_dir": place}, tmp_path))]) == 6, what
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("vlm-dist: output_dir: ") and "cannot be written" in line and len(line) < 450, line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")
def test_the_directory_of_another_user(settings):
    """One that is there: 5, as all that a run's own files refuse; a new one that cannot be made beside it: 6."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        config = write_config(settings | {"output_dir": f"{folder}/runs"}, Path(folder))
        (Path(folder) / "runs" / "tiny" / "logs").mkdir(parents=True)
        os.seteuid(NOBODY)
        try:
            for name, kind in (("tiny", CheckpointError), ("new", MachineError)):
                with pytest.raises(kind, match=rf"output_dir: {folder}/runs/{name} cannot be written \(Permission denied\); give yourself"):
                    _begun(config, f"name={name}")
        finally:
            os.seteuid(0)
    assert (CheckpointError.exit_code, MachineError.exit_code) == (5, 6)


def test_checkpoints_that_is_a_file_is_told_before_anything_is_done(settings, tmp_path, capsys):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "checkpoints").write_text("")
    assert main(["train", str(write_config(settings, tmp_path))]) == 6
    told = capsys.readouterr().err
    assert "checkpoints: is a file or a link to nowhere, expected a folder; move it away" in told and "room" not in told


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards, llava) -> tuple[Path, dict]:
    """A run of two steps whose result is gone, so that a start has something to do; and its settings."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {
        "name": "tiny", "output_dir": str(folder / "runs"), "model": {"name": llava, "dtype": "float32"}, "lora": {"r": 4},
        "data": {"train": shards["qa-train"], "max_seq_length": 256}, "training": {"steps": 2, "global_batch": 2, "micro_batch": 2},
        "checkpoint": {"save_every": 1}, "log": {"wandb": "disabled"},
    }  # fmt: skip
    assert main(["train", str(write_config(settings, folder))]) == 0
    shutil.rmtree(folder / "runs" / "tiny" / "adapter")
    return folder, settings


@pytest.fixture
def run(trained, tmp_path) -> tuple[RunDir, Path]:
    """A copy of it, and its configuration."""
    folder, settings = trained
    shutil.copytree(folder / "runs", tmp_path / "runs")
    return RunDir(tmp_path / "runs" / "tiny"), write_config(settings | {"output_dir": str(tmp_path / "runs")}, tmp_path)


def _begun(config: Path, *overrides: str, anyway: bool = False) -> None:
    with begin(load_config(config, overrides), alone(), resume_anyway=anyway):
        return


def test_start_goes_on_with_everything_damaged(run, capsys):
    folder, config = run
    shutil.rmtree(folder.checkpoints / "step-00000002")
    names = ("config.yaml", "summary.json", "events.jsonl", "environment.json", "logs/rank-0.alive.json", "logs/starts.jsonl")
    for name in names:
        (folder.path / name).write_bytes(b"\xff\x00 no text\n")
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    folder.metrics.write_bytes(b"garbage\n" + b"".join(lines))
    assert main(["train", str(config)]) == 0
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err and "continuing from" in told.out
    assert [row["step"] for row in read_jsonl(folder.metrics)] == [1, 2]
    assert read_json(folder.summary)["ended"] == "finished" and folder.changed(load_config(config)) == []
    assert {row["event"] for row in read_jsonl(folder.events)} == {"checkpoint"}
    assert main(["report", str(folder.path)]) == 0


def test_damaged_config_does_not_let_another_configuration_in(run, capsys):
    folder, config = run
    folder.config.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds a run of another configuration .*config.yaml is damaged"):
        _begun(config, "optim.lr=0.5")
    assert folder.config.read_bytes() == b""
    _begun(config)
    assert "is kept as config.yaml.damaged-1" in capsys.readouterr().out


def test_refused_resume_anyway_changes_nothing(run, capsys):
    folder, config = run
    kept = ("config.yaml", "environment.json", "summary.json", "metrics.jsonl", "events.jsonl")
    before = {name: (folder.path / name).read_bytes() for name in kept}
    try:
        code = main(["train", str(config), "data.train=/nowhere/*.tar", "--resume-anyway"])
    finally:
        assert {name: (folder.path / name).read_bytes() for name in kept} == before
    assert code == 3 and "/nowhere" in capsys.readouterr().err
    _begun(config)  # the first command is as welcome as before
    with pytest.raises(ConfigError, match="another configuration"):
        _begun(config, "optim.lr=0.5")


def test_failed_first_start_claims_no_name(settings, tmp_path, capsys):
    settings["data"]["heldout"] = []
    settings["training"]["steps"] = 1
    config, run = write_config(settings, tmp_path), RunDir(tmp_path / "runs" / "tiny")
    assert main(["train", str(config), "data.train=/nowhere/*.tar", "optim.lr=0.5"]) == 3
    assert read_json(run.summary)["ended"] == "failed" and not run.config.exists() and not run.is_begun
    run.config.write_text("name: of another program\n")  # as earlier versions left it
    assert main(["train", str(config)]) == 0
    assert run.is_begun and stat_mode(run.config) == 0o600


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_folder_that_goes_away_ends_the_run(run):
    folder, config = run
    loaded = load_config(config)
    with (
        pytest.raises(CheckpointError, match=r"metrics.jsonl: cannot be written .*Restore|gone"),
        begin(loaded, alone(), resume_anyway=False),
    ):
        shutil.rmtree(folder.path)
        folder.metrics.open("a")
    assert not folder.path.exists()  # and nothing is made in its place


def test_another_folder_in_its_place_is_noticed(run):
    from vlm_dist.training.log import Log

    folder, config = run
    log = Log(folder, load_config(config), alone(), 2)
    log._see_folder()
    folder.path.rename(folder.path.with_name("moved"))
    folder.path.mkdir()
    with pytest.raises(FileNotFoundError) as error:
        log._see_folder()
    assert is_of_disk(error.value, folder.path)


def test_second_job_of_a_live_run_is_refused(run, capsys):
    folder, config = run
    owner = hold(folder.path)
    try:
        assert main(["train", str(config)]) == 2
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    told = capsys.readouterr().err
    assert f"process {owner.pid} on" in told and "trains there now" in told


def test_a_file_where_the_result_must_be_is_told(run):
    folder, config = run
    folder.adapter.write_text("")
    with pytest.raises(MachineError, match="adapter: is a file"):
        _begun(config)
