"""launch/ray_train.py on a real Ray cluster on this machine: the same losses, mistakes told once, and a killed worker's run continued."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment, losses_of, run_command, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def start(*arguments: str, **changes: str) -> subprocess.Popen:
    environment = child_environment(RAY_USAGE_STATS_ENABLED="0", RAY_ADDRESS="", **changes)
    environment.pop("RAY_ADDRESS")
    command = [sys.executable, "launch/ray_train.py", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=800)
    return process.returncode, out, err


@pytest.fixture
def config(settings, tmp_path) -> str:
    settings["data"]["heldout"] = []
    settings["training"] = {"steps": 6, "global_batch": 4, "micro_batch": 2}
    return str(write_config(settings, tmp_path))


def test_a_mistake_is_told_once_with_its_exit_code(config, tmp_path):
    code, _, err = finish(start("--config", config, f"data.train={tmp_path}/nothing-*.tar", "ray.workers=1", "ray.max_failures=1"))
    own = [line for line in err.splitlines() if "TrainController" not in line]  # Ray's own words on a busy machine
    assert code == 3 and err.count("no shard matches") == 1 and not any("Traceback" in line for line in own)
    assert own[-1].startswith("vlm-dist: data.train: no shard matches")


def test_more_workers_than_the_cluster_has(config):
    """On a new cluster, although a dead one left its note here."""
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1\n")
        more = ["ray.workers=2", "ray.cpus_per_worker=500", "training.micro_batch=1"]
        code, _, err = finish(start("--config", config, *more, RAY_TMPDIR=folder))
    assert code == 6 and "the cluster has room for 0" in err.strip().splitlines()[-1]


def test_two_workers_one_of_them_killed_give_the_losses_of_one_process(config, tmp_path):
    """SIGKILL to one of two workers in mid-run: Ray restarts the group from the newest checkpoint, and nothing is lost."""
    more = ["training.steps=60", "checkpoint.save_every=4"]
    process = start("--config", config, "ray.workers=2", "name=killed", "--json", *more)
    run = tmp_path / "runs" / "killed"
    wait_for(lambda: any((run / "checkpoints").glob("step-*")), process)  # it is written beside the training
    os.kill(next(pid for pid in started_since(process.pid) if "RayTrainWorker" in command_of(pid)), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err[-3000:]
    assert json.loads(out[out.index("{\n") :])["ended"] == "finished"
    assert run_command("train", config, "name=plain", *more).returncode == 0
    assert losses_of(run) == pytest.approx(losses_of(tmp_path / "runs" / "plain"), rel=1e-4)
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    logs = [(run / "logs" / f"rank-{rank}.log") for rank in range(2)]
    assert all(path.exists() for path in logs) and "continuing from" in logs[0].read_text()


def test_a_node_is_lost_and_training_goes_on_with_fewer_workers(config, tmp_path):
    """Two Ray nodes of one CPU each; the second node's raylet is killed in mid-run: one worker goes on from the newest checkpoint, with the
    losses of one process."""
    more = ["training.steps=40", "training.micro_batch=1", "checkpoint.save_every=4"]
    address = f"127.0.0.1:{free_port()}"
    folder = tempfile.mkdtemp(
        prefix="ray-", dir="/tmp"
    )  # so that no other run takes this for the machine's cluster; sockets want short paths
    nodes = [
        ray_node(
            "--head",
            f"--temp-dir={folder}",
            f"--port={address.split(':')[1]}",
            "--node-ip-address=127.0.0.1",
            f"--dashboard-port={free_port()}",
        )
    ]
    try:
        wait_for(lambda: ray_says(address).count("node_") == 1, nodes[0])
        nodes.append(ray_node(f"--address={address}"))
        wait_for(lambda: ray_says(address).count("node_") == 2, nodes[1])
        process = start("--config", config, "ray.workers=2", "ray.min_workers=1", f"ray.address={address}", "name=lost", *more,
                        RAY_AUTH_MODE="disabled")  # fmt: skip
        run = tmp_path / "runs" / "lost"
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses_of(run)) >= 6, process)
        assert json.loads((run / "environment.json").read_text())["ranks"] == 2
        raylets = (pid for pid in started_since(nodes[1].pid) if "raylet/raylet" in command_of(pid) and parent_of(pid) == nodes[1].pid)
        os.kill(next(raylets), signal.SIGKILL)
        code, _, err = finish(process)
        assert code == 0, err[-3000:]
        assert json.loads((run / "environment.json").read_text())["ranks"] == 1
        assert run_command("train", config, "name=plain", *more).returncode == 0
        assert losses_of(run) == pytest.approx(losses_of(tmp_path / "runs" / "plain"), rel=1e-4)
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def ray_node(*options: str) -> subprocess.Popen:
    """One Ray node with one CPU, without a token: it listens on this machine alone."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", "--disable-usage-stats", *options]
    environment = child_environment(RAY_AUTH_MODE="disabled")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ray_says(address: str) -> str:
    command = [str(Path(sys.executable).with_name("ray")), "status", "--address", address]
    environment = child_environment(RAY_AUTH_MODE="disabled")
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60).stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parent_of(pid: int) -> int:
    return int(stat_of(pid)[1])


def stat_of(pid: int) -> list[str]:
    """What /proc/PID/stat says after the name: state, parent, ...; the 20th is when it started."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def wait_for(condition, process: subprocess.Popen) -> None:
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("it did not happen in 600 s")


def started_since(pid: int) -> list[int]:
    """All processes that began no earlier than one. Ray's daemons leave their parent, and numbers wrap around: neither tells."""
    began, found = int(stat_of(pid)[19]), []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                found += [int(path.name)] if int(stat_of(int(path.name))[19]) >= began else []
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
