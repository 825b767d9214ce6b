"""Two hosts on this machine: network namespaces, each with a name, an address and a hosts file of its own. What passes between them
crosses a link, and nothing of one's loopback is the other's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment, losses_of, write_config
from tests.launch.test_ray import QUICKLY
from vlm_dist import load_config, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of two hosts, each with an interface eth0. The second has its own name at 127.0.1.1 in its hosts file, as Debian writes it."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and `ip` (apt-get install iproute2)")
    names = [f"vlm{os.getpid()}{letter}" for letter in "ab"]
    addresses = {name: f"10.231.7.{number + 1}" for number, name in enumerate(names)}
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error.stderr}")
    folders = [Path("/etc/netns") / name for name in names]
    try:
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, folder in zip(names, folders, strict=True):
            for words in (
                ["addr", "add", f"{addresses[name]}/24", "dev", "eth0"],
                ["link", "set", "eth0", "up"],
                ["link", "set", "lo", "up"],
            ):
                ip("-n", name, *words)
            folder.mkdir(parents=True)
            known = addresses if name == names[0] else addresses | {name: "127.0.1.1"}
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in known.items()))
        yield names
    finally:
        for name, folder in zip(names, folders, strict=True):
            ip("netns", "del", name)
            shutil.rmtree(folder, ignore_errors=True)


def on(host: str, words: list[str], called: str = "", **changes: str) -> subprocess.Popen:
    """A command on that host, which has its name, or is called something else."""
    inside = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', called or host, *words]
    environment = child_environment(**{"GLOO_SOCKET_IFNAME": "eth0", "PATH": f"{BIN}:{os.environ['PATH']}", **changes})
    return subprocess.Popen(inside, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(started: list[subprocess.Popen]) -> list[str]:
    output = [process.communicate(timeout=500)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(text[-6000:] for text in output)
    return output


@pytest.fixture
def config(settings, tmp_path) -> str:
    settings["data"]["heldout"] = []
    settings["training"] = {"steps": 4, "global_batch": 4, "micro_batch": 2}
    return str(write_config(settings, tmp_path))


@pytest.fixture
def expected(config, tmp_path) -> list[float]:
    """The losses of one process."""
    train(load_config(config, ["name=alone"]))
    return losses_of(tmp_path / "runs" / "alone")


def test_preflight_on_two_hosts(hosts, settings, tmp_path):
    """`vlm-dist launch --torchrun --nodes 2 --preflight` on each: doctor of both, the link between them, the folder that both see."""
    settings["training"] = {"steps": 4, "global_batch": 4, "micro_batch": 2}
    config = str(write_config(settings, tmp_path))
    words = [sys.executable, "-m", "vlm_dist.cli.main", "launch", config, "--torchrun", "--nodes", "2", "--gpus", "1", "--head", hosts[0]]
    output = finish([on(host, [*words, "--preflight"]) for host in hosts])
    told = next(text for text in output if "on these nodes" in text)
    assert "fit to train on these nodes: 0 bad" in told and sum("on these nodes" in text for text in output) == 1
    assert all(f"  ok  {host}" in told for host in hosts) and "versions      the same on 2 nodes" in told
    assert f"{hosts[0]} - {hosts[1]}" in told or f"{hosts[1]} - {hosts[0]}" in told
    assert "is the same folder on all ranks" in told and not list((tmp_path / "runs").iterdir()), json.dumps(told)


LINKS = """
from vlm_dist import distributed
from vlm_dist.checking import preflight
ranks = distributed.start()
nodes = preflight._nodes(ranks)
print(nodes, [check.name for check in preflight._links(ranks, nodes)])
distributed.stop_at_exit()
"""


def test_preflight_on_two_hosts_of_one_name(hosts):
    """Machines that are all called localhost, or containers: told apart, and the link between them is measured."""
    for told in finish(ranks_on(hosts, [sys.executable, "-c", LINKS], called="node")):
        assert told.splitlines()[-1] == "['node (rank 0)', 'node (rank 1)'] ['node (rank 0) - node (rank 1)']"


def inside(names: list[str]) -> None:
    """The hosts file of each says 127.0.1.1 of its own name, as Debian writes it, and nothing of the other."""
    for name in names:
        (Path("/etc/netns") / name / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")


def ranks_on(hosts: list[str], words: list[str], called: str = "", **changes: str) -> list[subprocess.Popen]:
    """A rank on each, without a launcher, which meet at the second's address."""
    group = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.231.7.2", "MASTER_PORT": "25999", **changes}
    return [on(host, words, called, RANK=str(rank), **group) for rank, host in enumerate(reversed(hosts))]


def test_own_names_that_lead_nowhere_else(hosts, tmp_path):
    """Both at 127.0.1.1: ranks find the network between them themselves. One that leads nowhere is refused in a line, by preflight too."""
    inside(hosts)
    output = finish(ranks_on(hosts, [sys.executable, "tests/launch/rank.py", str(tmp_path), "/runs/a"], GLOO_SOCKET_IFNAME=""))
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in (0, 1)] == ["3.0", "3.0"]
    for host, address, text in zip(reversed(hosts), ("10.231.7.2", "10.231.7.1"), output, strict=True):
        assert f"{host} is 127.0.1.1 by its own name, which no other node reaches: ranks meet over eth0 ({address})" in text
    preflight = [sys.executable, "launch/train.py", "--config", "configs/quickstart.yaml", "--preflight"]
    started = ranks_on(hosts, preflight, GLOO_SOCKET_IFNAME="lo")
    until(lambda: any(process.poll() is not None for process in started))  # the one that must connect; the other listens, until it is ended
    rank = next(number for number, process in enumerate(started) if process.poll() is not None)
    started[1 - rank].kill()
    told, _ = [process.communicate()[0] for process in (started[rank], started[1 - rank])]
    assert started[rank].returncode == 6 and "Traceback" not in told, told
    assert f"rank {rank} on {hosts[1 - rank]} cannot reach the others (" in told and "here it is 'lo'" in told, told


def test_torchrun_and_deepspeed_on_two_hosts(hosts, config, expected, tmp_path):
    """`vlm-dist launch --torchrun --nodes 2`, and the deepspeed launcher with its own form of one command a node."""
    launch = [sys.executable, "-m", "vlm_dist.cli.main", "launch", config, "--torchrun", "--nodes", "2", "--gpus", "1", "--head", hosts[0]]
    finish([on(host, [*launch, "name=torchrun"]) for host in hosts])
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts))
    deepspeed = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh", "--master_addr", hosts[0], "--master_port", "29511"]
    train_py = ["launch/train.py", "--config", config, "name=deepspeed"]
    for more in (["--preflight"], []):
        output = finish([on(host, [*deepspeed, "--node_rank", str(number), *train_py, *more]) for number, host in enumerate(hosts)])
        assert "".join(output).count("fit to train on these nodes: 0 bad") == len(more), output
    for name in ("torchrun", "deepspeed"):
        assert losses_of(tmp_path / "runs" / name) == pytest.approx(expected, rel=1e-4), name


@pytest.mark.ray
def test_ray_on_two_hosts(hosts, config, expected, tmp_path):
    """`ray start` on each, and one driver: a worker on each host."""
    ray, first = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", "--disable-usage-stats"], "10.231.7.1"
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = ["--head", "--port=6379", f"--node-ip-address={first}", f"--temp-dir={folder}", "--include-dashboard=false"]
        nodes = [on(hosts[0], [*ray, *head], **QUICKLY)]
        try:
            driver = [sys.executable, "launch/ray_train.py", "--config", config, f"ray.address={first}:6379"]
            until(lambda: "node_" in status(hosts[0], first))
            nodes.append(on(hosts[1], [*ray, f"--address={first}:6379", "--node-ip-address=10.231.7.2"], **QUICKLY))
            for more in (["--preflight"], []):
                (told,) = finish([on(hosts[0], [*driver, "ray.workers=2", "ray.wait_s=200", "name=ray", *more], **QUICKLY)])
                assert told.count("fit to train on these nodes: 0 bad") == len(more), told
        finally:
            for node in reversed(nodes):
                node.terminate()
                node.wait(60)
    assert losses_of(tmp_path / "runs" / "ray") == pytest.approx(expected, rel=1e-4)
    where = json.loads((tmp_path / "runs" / "ray" / "environment.json").read_text())
    assert where["ranks"] == 2


def status(host: str, address: str) -> str:
    return on(host, [str(BIN / "ray"), "status", "--address", f"{address}:6379"], **QUICKLY).communicate(timeout=300)[0]


def until(true, seconds: float = 200) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.5)
