"""Several starts and restarts on one machine, by the real launchers: who belongs together finds one another, who does not says so."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment, command, write_config
from vlm_dist.cli.main import main
from vlm_dist.distributed import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BIN = Path(sys.executable).parent
RANK = str(ROOT / "tests" / "launch" / "rank.py")
LEAVES = "it leaves without harm"


def together(*commands: list[str], alone: bool = False) -> list[tuple[int, str]]:
    """The exit code and output of commands that run at the same time.

    Args:
        alone: in a network of their own, where every port is free.
    """
    words = ["unshare", "--net", "sh", "-c", f"ip link set lo up; {' & '.join(map(shlex.join, commands))} & wait"]
    environment = child_environment(PATH=f"{BIN}:{os.environ['PATH']}", OMP_NUM_THREADS="1")
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        environment.pop(name, None)
    started = [
        subprocess.Popen(one, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for one in ([words] if alone else commands)
    ]
    return [(process.wait(), out) for process, (out, _) in [(one, one.communicate(timeout=200)) for one in started]]


def agents(folders: list[Path], runs: list[str], *more: str, restarts: int = 0) -> list[tuple[int, str]]:
    """One torchrun for each of two nodes, which meet at one rendezvous."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "test"]
    torchrun = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", str(restarts), *meeting, RANK]
    return together(*[[*torchrun, str(folder), run, *more] for folder, run in zip(folders, runs, strict=True)])


def test_a_restart_that_one_agent_alone_counts(tmp_path):
    """Rank 1 is killed twice, once before it has joined: its agent counts 2 restarts, the other's none, and the ranks meet each time."""
    found = agents([tmp_path] * 2, ["/runs/a"] * 2, "--lost", restarts=3)
    assert [code for code, _ in found] == [0, 0], found
    counted = [[(tmp_path / f"start-{rank}-{number}").read_text() for number in (1, 2, 3)] for rank in (0, 1)]
    assert counted == [["0", "0", "0"], ["0", "1", "2"]]
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in (0, 1)] == ["3.0", "3.0"]


def test_agents_that_meet_at_an_address_of_ipv6(tmp_path, capsys):
    """What `vlm-dist launch --head ::1` prints, with ranks that only meet."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    words = ["--torchrun", "--nodes", "2", "--gpus", "1", "--head", "::1", "--port", str(free_port()), "training.micro_batch=1", "--print"]
    assert main(["launch", str(ROOT / "configs" / "quickstart.yaml"), *words]) == 0
    printed = shlex.split(capsys.readouterr().out)
    torchrun = [str(BIN / "torchrun"), *printed[1 : next(place for place, word in enumerate(printed) if word.endswith("train.py"))]]
    found = together(*[[*torchrun, RANK, str(tmp_path), "/runs/a"]] * 2)
    assert [code for code, _ in found] == [0, 0], found
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in (0, 1)] == ["3.0", "3.0"]


def test_two_starts_with_one_rdzv_id(tmp_path):
    """torchrun makes one group of a node of each. Both say so at once, and neither trains."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    found = agents(folders, ["/runs/a", "/runs/b"])
    output = "".join(out for _, out in found)
    assert [code for code, _ in found] == [1, 1] and output.count(LEAVES) == 1, output
    assert output.count("and torchrun counts it to this start") == output.count("or --rdzv-id than 'test'") == 1, output
    assert not list(tmp_path.glob("*/sum-*"))


@pytest.mark.parametrize("launcher", ["deepspeed --num_gpus 2", "torchrun --nproc-per-node 2"])
def test_two_starts_at_once_on_the_launchers_own_port(launcher, tmp_path):
    """deepspeed's is always 29500: whoever is first there trains, the other's ranks end with a line each; torchrun takes a free one."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("a network of its own needs root, `unshare` and `ip`: the launchers' own ports may be in use here")
    commands = []
    for name in "ab":
        (tmp_path / name).mkdir()
        words = [*launcher.split(), RANK, str(tmp_path / name), f"/runs/{name}", "--stays", "4" if "deepspeed" in launcher else "0"]
        commands.append(["sh", "-c", f"{shlex.join([str(BIN / words[0]), *words[1:]])}; echo {name} ended with $?"])
    ((code, output),) = together(*commands, alone=True)
    sums = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/sum-*"))
    ended = sorted(line.split()[-1] for line in output.splitlines() if " ended with " in line)
    assert code == 0 and {(tmp_path / path).read_text() for path in sums} == {"3.0"}, output
    if launcher.startswith("torchrun"):
        assert ended == ["0", "0"] and len(sums) == 4, output
        return
    assert ended == ["0", "6"] and len(sums) == 2 and sums[0][0] == sums[1][0], output
    assert output.count("port 29500 (MASTER_PORT) of this machine is in use") == output.count(LEAVES) == 1, output
    assert "frame #" not in output and "Traceback" not in output, output


def test_which_variables_deepspeed_hands_to_other_nodes(settings, tmp_path):
    """What it would run there by pdsh, as docs/scaling.md says: PYTHON* and what .deepspeed_env has; the others are named first."""
    for name, text in (("ssh", "exit 0"), ("pdsh", f'printf "%s\\n" "$@" > {tmp_path}/said')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hostfile").write_text("a slots=1\nb slots=1\n")
    (tmp_path / ".deepspeed_env").write_text("HF_HOME=/data/hf\n")
    there = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "HF_HOME": "/here", "HF_HUB_OFFLINE": "1", "MV2_A": "1"}
    words = ["launch", str(write_config(settings, tmp_path)), "--deepspeed", "--nodes", "2", "--gpus", "1", "--head", "a"]
    hostfile = ["--hostfile", str(tmp_path / "hostfile"), "training.micro_batch=1"]
    done = subprocess.run(
        command(*words, *hostfile), cwd=ROOT, env=child_environment(**there), capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("vlm-dist: launch: deepspeed hands ")]
    left = told.partition("hands ")[2].partition(" to no other node")[0].split(", ")
    handed = dict(one.split("=", 1) for one in re.findall(r"export ([^;]+);", (tmp_path / "said").read_text()))
    assert handed["HF_HOME"] == "/data/hf" and handed["MV2_A"] == "1" and str(ROOT) in handed["PYTHONPATH"]
    assert "HF_HUB_OFFLINE" in left and "HF_HOME" not in left and not set(left) & set(handed)
