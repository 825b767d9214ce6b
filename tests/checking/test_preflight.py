"""What `--preflight` refuses: two ranks that differ as two nodes may, each fault made on a real process, disk or clock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment, write_config
from vlm_dist.checking.preflight import refusal
from vlm_dist.cli.main import main
from vlm_dist.config_load import load_config
from vlm_dist.distributed import free_port
from vlm_dist.run_dir import RunDir
from vlm_dist.run_lock import RunLock

pytestmark = pytest.mark.slow


@pytest.fixture
def config(settings, tmp_path) -> str:
    settings["data"]["heldout"] = []
    return str(write_config(settings, tmp_path))


@pytest.fixture
def full_disk(tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("a small file system can only be mounted by root")
    with pytest.raises(OSError, match="No space left"), (folder / "filled").open("wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def preflight(config: str, *more: str, second: dict[str, str], before: tuple[str, ...] = ()) -> tuple[list[int], dict[str, dict]]:
    """The exit codes of two ranks, and the findings by name.

    Args:
        second: what the environment of rank 1 has besides.
        before: what rank 1 is started by.
    """
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", config, "--preflight", "--json", *more]
    started = []
    for rank, (start, there) in enumerate((((), {}), (before, second))):
        environment = child_environment(**group, RANK=str(rank), LOCAL_RANK="0")
        environment |= {name: f"{value}{environment[name]}" if name == "PYTHONPATH" else value for name, value in there.items()}
        started.append(subprocess.Popen([*start, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    (told, err), (nothing, other) = [process.communicate(timeout=200) for process in started]
    assert not nothing and "Traceback" not in err + other, err + other
    found = json.loads(told[told.index("{\n") :])
    assert found["fit"] is False
    return [process.returncode for process in started], {check["name"]: check for check in found["checks"]}


def test_versions_clocks_and_a_full_disk(config, full_disk, tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("the layer below a process needs gcc")
    library = tmp_path / "clock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(ROOT / "tests/checking/clock.c"), "-ldl"], check=True)
    other = tmp_path / "other" / "wandb-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 9.9.9\n")
    second = {"PYTHONPATH": f"{other.parent}:", "LD_PRELOAD": str(library), "CLOCK_AHEAD": "60"}
    codes, found = preflight(config, f"output_dir={full_disk}", second=second)
    assert codes == [6, 6]
    for name, words in (
        ("version of wandb", f"{os.uname().nodename} 9.9.9"),
        ("clocks", f"{os.uname().nodename} is 6"),
        ("output_dir", f"{full_disk} cannot be written (No space left on device)"),
    ):
        assert found[name]["state"] == "bad" and words in found[name]["found"] and found[name]["fix"], found
    assert not [name for name in os.listdir(full_disk) if name.startswith(".preflight")]


def test_what_a_start_would_refuse_in_the_runs_own_directory(tmp_path):
    """A run of another configuration, a file in its place; another user's needs another user."""
    config = load_config(str(ROOT / "configs" / "quickstart.yaml"), [f"output_dir={tmp_path}"])
    run = RunDir(tmp_path / config.name)
    assert refusal(config, run, resume_anyway=False) == ("", "")
    run.claim(load_config(str(ROOT / "configs" / "quickstart.yaml"), [f"output_dir={tmp_path}", "optim.lr=0.5"]))
    assert refusal(config, run, resume_anyway=False)[0] == ""  # nothing is begun
    run.metrics.write_text('{"loss": 1.0}\n')
    found, fix = refusal(config, run, resume_anyway=False)
    assert found.startswith(f"{run.path} holds a run of another configuration (optim.lr: 0.5 -> ") and "name=..." in fix
    assert refusal(config, run, resume_anyway=True)[0] == ""
    lock = RunLock(run)
    lock.acquire()
    found, fix = refusal(config, run, resume_anyway=True)
    assert found.startswith(f"{run.path}: process {os.getpid()} on {os.uname().nodename}, since ") and found.endswith(" trains there now")
    assert "wait for its end" in fix
    owner = json.loads(run.lock.read_text())
    run.lock.write_text(json.dumps(owner | {"host": "node-b"}))
    assert "on node-b" in refusal(config, run, resume_anyway=True)[0]
    os.utime(run.lock, (0, time.time() - 60))  # dead for so long
    assert refusal(config, run, resume_anyway=True)[0] == ""
    run.lock.write_text(json.dumps(owner))
    lock.release()
    assert refusal(config, run, resume_anyway=True)[0] == ""
    shutil.rmtree(run.path)
    run.path.touch()
    assert f"{run.path} is a file" in refusal(config, run, resume_anyway=True)[0]


def test_ranks_that_cannot_share_a_batch(capsys):
    """As the training itself refuses them, before anything is looked at."""
    words = ["train", str(ROOT / "configs" / "quickstart.yaml"), "--preflight", "engine.sequence_parallel=2"]
    assert main(words) == 2 and "1 ranks cannot be put into groups of 2" in capsys.readouterr().err


def test_an_output_dir_that_is_another_on_each_node(config, tmp_path):
    """Rank 1 has a disk of its own mounted there, as a node that lacks the shared one would write to its local one."""
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("a mount of its own needs root and `unshare`")
    runs = tmp_path / "runs"
    runs.mkdir()
    own = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {runs} && exec "$@"', "sh")
    codes, found = preflight(config, second={}, before=own)
    assert codes == [6, 6] and found["output_dir"]["state"] == "bad"
    assert f"does not see what the first rank writes to {runs}" in found["output_dir"]["found"] and not list(Path(runs).iterdir())


SHARES = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
from pathlib import Path
from vlm_dist import distributed
from vlm_dist.checking import preflight
ranks = distributed.start()
if not ranks.is_first:
    preflight._read = lambda path: time.sleep(100)  # a file server that does not answer
list(preflight._shared(Path(sys.argv[1]), ranks, ["node-a", "node-b"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_another_rank_stands_still(tmp_path, number):
    """What the first rank wrote for the others to read is gone with it, although it waits in a collective."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
    words = [sys.executable, "-c", SHARES, str(tmp_path)]
    ranks = [subprocess.Popen(words, env=child_environment(**group, RANK=str(rank)), stderr=subprocess.DEVNULL) for rank in range(2)]
    try:
        for _ in range(3000):
            if list(tmp_path.iterdir()):
                break
            time.sleep(0.05)
        time.sleep(0.3)
        assert [path.name for path in tmp_path.iterdir()] == [f".preflight-{ranks[0].pid}"]
        ranks[0].send_signal(number)
        assert ranks[0].wait(20) == 128 + number and not list(tmp_path.iterdir())
    finally:
        for process in ranks:
            process.kill()
            process.wait()
