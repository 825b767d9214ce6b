"""Two hosts on this machine: network namespaces, each with a name, an address and a hosts file of its own. What passes between them
crosses a link, and nothing of one's loopback is the other's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment, write_config

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


def on(host: str, words: list[str]) -> subprocess.Popen:
    """A command on that host, which has its name."""
    inside = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host, *words]
    environment = child_environment(GLOO_SOCKET_IFNAME="eth0", PATH=f"{BIN}:{os.environ['PATH']}")
    return subprocess.Popen(inside, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_preflight_on_two_hosts(hosts, settings, tmp_path):
    """`vlm-dist launch --torchrun --nodes 2 --preflight` on each: doctor of both, the link between them, the folder that both see."""
    settings["training"] = {"steps": 4, "global_batch": 4, "micro_batch": 2}
    config = str(write_config(settings, tmp_path))
    words = [sys.executable, "-m", "vlm_dist.cli.main", "launch", config, "--torchrun", "--nodes", "2", "--gpus", "1", "--head", hosts[0]]
    started = [on(host, [*words, "--preflight"]) for host in hosts]
    output = [process.communicate(timeout=500)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], output
    told = next(text for text in output if "on these nodes" in text)
    assert "fit to train on these nodes: 0 bad" in told and sum("on these nodes" in text for text in output) == 1
    assert all(f"  ok  {host}" in told for host in hosts) and "versions      the same on 2 nodes" in told
    assert f"{hosts[0]} - {hosts[1]}" in told or f"{hosts[1]} - {hosts[0]}" in told
    assert "is the same folder on all ranks" in told and not list((tmp_path / "runs").iterdir()), json.dumps(told)
