"""launch/ray_train.py on a real Ray cluster on this machine: the same losses, mistakes told once, and a killed worker's run continued."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment, command, losses_of, run_command, write_config

RAY = Path(sys.executable).with_name("ray")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


# Ray's workers run at a niceness of 15, and so stand still beside a busy test; it looks for dead nodes every three seconds, five times.
QUICKLY = {
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # it listens on this machine alone
}


def start(*arguments: str, **changes: str) -> subprocess.Popen:
    environment = child_environment(**QUICKLY, **changes)
    environment.pop("RAY_ADDRESS", None)
    words = [sys.executable, "launch/ray_train.py", *arguments]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=800)
    return process.returncode, out, err


@pytest.fixture
def config(settings, tmp_path) -> str:
    settings["data"]["heldout"] = []
    settings["training"] = {"steps": 6, "global_batch": 4, "micro_batch": 2}
    return str(write_config(settings, tmp_path))


class Cluster:
    """Ray nodes of one CPU each on this machine, with a dashboard, which takes jobs."""

    def __init__(self, folder: str, nodes: int = 2):
        self.gcs = f"127.0.0.1:{(port := free_port())}"
        self.address, self.jobs = f"ray.address={self.gcs}", f"http://127.0.0.1:{(dashboard := free_port())}"
        here = [f"--temp-dir={folder}", f"--port={port}", "--node-ip-address=127.0.0.1", f"--dashboard-port={dashboard}"]
        self.nodes: list[subprocess.Popen] = []
        self._begin("--head", "--dashboard-host=127.0.0.1", *here)
        for _ in range(nodes - 1):
            self.add()

    def add(self) -> None:
        """One more node."""
        self._begin(f"--address={self.gcs}")

    def _begin(self, *options: str) -> None:
        """Ray gives its helpers 15 s to start, and a node ends without them: on a busy machine it is started again."""
        port = int(self.gcs.rpartition(":")[2])
        for _ in range(4):
            node = ray_node(*options, f"--dashboard-agent-listen-port={free_port()}")
            while node.poll() is None:
                if answers(port) and ray_says(self.gcs).count("node_") == len(self.nodes) + 1:
                    self.nodes.append(node)
                    return
                time.sleep(0.1)
        raise AssertionError("no node of Ray comes up on this machine")


@contextlib.contextmanager
def started_cluster(nodes: int):
    """In a folder of its own, so that no other run takes it for the machine's cluster; sockets want short paths."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    made = Cluster(folder, nodes)
    try:
        yield made
    finally:
        for node in reversed(made.nodes):
            node.terminate()
            node.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster():
    """One for the tests of this file; the last of them takes a node away."""
    with started_cluster(nodes=2) as made:
        yield made


def test_a_mistake_is_told_once_with_its_exit_code(cluster, config, tmp_path):
    more = [cluster.address, f"data.train={tmp_path}/nothing-*.tar", "ray.workers=1", "ray.max_failures=1"]
    code, _, err = finish(start("--config", config, *more))
    own = [line for line in err.splitlines() if not re.search("TrainController|PlacementGroupCleaner", line)]  # Ray's own words
    assert code == 3 and err.count("no shard matches") == 1 and not any("Traceback" in line for line in own)
    assert own[-1].startswith("vlm-dist: data.train: no shard matches")


def test_more_workers_than_the_cluster_has(config):
    """On a new cluster, although a dead one left its note here: no node will join it, and nothing is waited for."""
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1\n")
        more = ["ray.workers=2", "ray.cpus_per_worker=500", "training.micro_batch=1"]
        code, _, err = finish(start("--config", config, *more, RAY_TMPDIR=folder))
    assert code == 6 and "the cluster has room for 0" in err.strip().splitlines()[-1]


def test_room_is_waited_for_and_a_gpu_means_a_gpu(cluster, config):
    """A cluster that others may join: told who waits for what, until `ray.wait_s`; CPUs are no room for who wants a GPU."""
    code, out, err = finish(start("--config", config, cluster.address, "ray.workers=1", "ray.use_gpu=true", "ray.wait_s=1"))
    last = err.strip().splitlines()[-1]
    assert code == 6 and "1 workers are asked for, each with 1 CPU, 1 GPU on one node; the cluster has room for 0" in last
    assert "after 1 s (ray.wait_s)" in last and "ray: waiting up to 1 s more: 1 workers" in out


def test_a_job_that_is_stopped_has_saved(cluster, config, tmp_path):
    """`ray job stop` gives it checkpoint.grace_s; a run that would lie in the copy of the working directory is refused."""
    told = subprocess.run(
        command("launch", config, "--ray", "--gpus", "1", "--address", cluster.jobs, "name=job", "training.steps=5000", "--print"),
        capture_output=True, text=True, cwd=ROOT, env=child_environment(), check=True,
    )  # fmt: skip
    words = [word.replace('"excludes": [', '"excludes": ["/docs", "/tests", ') for word in shlex.split(told.stdout)]
    environment = child_environment(**QUICKLY)
    refused = subprocess.run([*words, "output_dir=runs"], capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    told_there = "output_dir: 'runs' is in the copy of the working directory"
    assert refused.returncode == 1 and told_there in refused.stdout, refused.stdout + refused.stderr
    words[words.index("--") : words.index("--")] = ["--submission-id=stopped", "--no-wait"]
    subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    run = tmp_path / "runs" / "job"
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses_of(run)) >= 3, cluster.nodes[0])
    job = [words[0], "job"]
    at = ["--address", cluster.jobs, "stopped"]
    subprocess.run([*job, "stop", *at], capture_output=True, cwd=ROOT, env=environment, check=True, timeout=120)
    log = subprocess.run([*job, "logs", *at], capture_output=True, text=True, cwd=ROOT, env=environment, check=True).stdout
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["ended"], summary["signal"]) == ("interrupted", "SIGTERM") and summary["step"] == len(losses_of(run))
    assert (run / "checkpoints" / f"step-{summary['step']:08d}").is_dir() and "interrupted by SIGTERM" in log
    assert "get_kernel" not in log  # the repository's kernels/ is no package of that name


def test_two_workers_one_of_them_killed_give_the_losses_of_one_process(cluster, config, tmp_path):
    """SIGHUP to the driver (a closed terminal): its workers save and end. The same command goes on; SIGKILL to one of its two workers: Ray
    restarts the group from the newest checkpoint. Nothing is lost."""
    more = ["training.steps=150", "checkpoint.save_every=25"]  # long beside the seconds that the word to stop may take
    words = ["--config", config, cluster.address, "ray.workers=2", "name=killed", "--json", *more]
    process, run = start(*words), tmp_path / "runs" / "killed"
    wait_for(lambda: (run / "metrics.jsonl").exists() and losses_of(run), process)
    process.send_signal(signal.SIGHUP)
    code, out, err = finish(process)
    summary = json.loads(out[out.index("{\n") :])
    assert code == 129 and (summary["ended"], summary["signal"]) == ("interrupted", "SIGHUP"), out[-2000:] + err[-2000:]
    assert summary["step"] == len(losses_of(run)) < 150 and (run / "checkpoints" / f"step-{summary['step']:08d}").is_dir()
    process = start(*words)
    wait_for(lambda: len(losses_of(run)) > summary["step"], process)
    os.kill(next(pid for pid in started_since(process.pid) if "RayTrainWorker" in command_of(pid)), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err[-3000:]
    assert "step 150/150" in out and "step 150/150" not in err  # what a worker prints comes once
    assert json.loads(out[out.index("{\n") :])["ended"] == "finished"
    assert run_command("train", config, "name=plain", *more).returncode == 0
    assert losses_of(run) == pytest.approx(losses_of(tmp_path / "runs" / "plain"), rel=1e-4)
    assert (run / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    logs = [(run / "logs" / f"rank-{rank}.log") for rank in range(2)]
    assert all(path.exists() for path in logs) and "continuing from" in logs[0].read_text()


def test_a_node_that_is_drained_loses_no_step(cluster, config, tmp_path):
    """Three nodes, and a batch that three ranks cannot share: two train. One of their nodes is told to end, as a pod or a spot machine is:
    they save, and go on elsewhere. Then Ctrl-C to the driver."""
    cluster.add()
    more = ["training.steps=5000", "training.micro_batch=1", "checkpoint.save_every=0", "ray.max_failures=3"]
    process = start("--config", config, "ray.workers=4", "ray.min_workers=1", cluster.address, "name=drained", *more)
    run = tmp_path / "runs" / "drained"
    wait_for(lambda: (run / "metrics.jsonl").exists() and losses_of(run), process)
    ranks = [json.loads((run / "logs" / f"rank-{rank}.alive.json").read_text())["pid"] for rank in range(2)]
    node = next(node for node in cluster.nodes[1:] if node.pid in [parent_of(parent_of(pid)) for pid in ranks])
    node.terminate()  # Ray drains it before it ends, for RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
    cluster.nodes.remove(node)
    wait_for(lambda: "interrupted" in (run / "summary.json").read_text() if (run / "summary.json").exists() else False, process)
    saved = json.loads((run / "summary.json").read_text())["step"]
    wait_for(lambda: len(losses_of(run)) > saved, process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130 and "of 1 to 4 workers only 1, 2, 4 can share a global batch of 4" in out, out[-3000:] + err[-3000:]
    assert f"(step {saved})" in (run / "logs" / "rank-0.log").read_text()
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    assert len(losses_of(run)) == json.loads((run / "summary.json").read_text())["step"]
    assert node.wait(60) is not None


def test_a_node_is_lost_and_training_goes_on_with_fewer_workers(cluster, config, tmp_path):
    """The second node's raylet is killed in mid-run: one worker goes on from the newest checkpoint, with the losses of one process."""
    more = ["training.steps=40", "training.micro_batch=1", "checkpoint.save_every=4"]
    process = start("--config", config, "ray.workers=2", "ray.min_workers=1", cluster.address, "name=lost", *more)
    run = tmp_path / "runs" / "lost"
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses_of(run)) >= 6, process)
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    second = cluster.nodes[1].pid
    raylets = (pid for pid in started_since(second) if "raylet/raylet" in command_of(pid) and parent_of(pid) == second)
    os.kill(next(raylets), signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err[-3000:]
    assert json.loads((run / "environment.json").read_text())["ranks"] == 1
    assert run_command("train", config, "name=plain", *more).returncode == 0
    assert losses_of(run) == pytest.approx(losses_of(tmp_path / "runs" / "plain"), rel=1e-4)


def ray_node(*options: str) -> subprocess.Popen:
    """One Ray node with one CPU."""
    words = [str(RAY), "start", "--block", "--num-cpus=1", "--disable-usage-stats", *options]
    environment = child_environment(**QUICKLY)
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ray_says(address: str) -> str:
    words = [str(RAY), "status", "--address", address]
    environment = child_environment(RAY_AUTH_MODE="disabled")
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=300).stdout


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
