"""How ranks find one another, without a launcher: what its variables say, who is missing, and who has come to the wrong place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.conftest import OF_A_RANK, ROOT, child_environment, run_command, write_config
from vlm_dist import joining, mistakes, networks
from vlm_dist.checking import doctor
from vlm_dist.cli.main import main
from vlm_dist.config import RayConfig
from vlm_dist.distributed import free_port
from vlm_dist.errors import ConfigError, MachineError
from vlm_dist.launched import PORTS, Place, announced, port_of
from vlm_dist.training import ray_cluster

SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "123456"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*OF_A_RANK, *SLURM, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(joining, "_connected", [])


def say(monkeypatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is set, expected a whole number"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK='' is set, expected a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' is set, expected a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2: ranks are counted from 0"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "ranks are counted from 0"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set, but RANK is not"),
        ({"RANK": "1"}, "RANK=1 is set, but WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "x"}, "MASTER_PORT='x' is set, expected a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "MASTER_PORT='70000' is set, expected a port of 1 to 65535"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "but MASTER_ADDR is not set"),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "2"}, "srun on several nodes: MASTER_ADDR is not set"),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": ""}, "srun on several nodes: MASTER_ADDR is not set"),
    ],
)
def test_variables_that_do_not_agree(monkeypatch, variables, told):
    """One line that names the variable; also a finding of doctor."""
    say(monkeypatch, **variables)
    with pytest.raises(MachineError) as error:
        announced()
    assert told in str(error.value) and "\n" not in str(error.value)


def test_places(monkeypatch):
    assert announced() == Place(0, 0, 1, "127.0.0.1", 0, "")
    say(monkeypatch, RANK="0")
    assert announced().world_size == 1
    monkeypatch.delenv("RANK")
    say(monkeypatch, **SLURM)
    place = announced()
    assert (place.rank, place.world_size, place.port) == (1, 2, 23456) and place.said_by == "SLURM_PROCID=1 and SLURM_STEP_NUM_TASKS=2"
    (finding,) = [check for check in doctor._variables() if check.name == "launcher"]
    assert finding.state == "bad" and "waits for 1 other ranks at 127.0.0.1:23456" in finding.found and "-u SLURM_PROCID" in finding.fix
    say(monkeypatch, MASTER_ADDR="")
    assert announced().host == "127.0.0.1"
    say(monkeypatch, RANK="1", LOCAL_RANK="1", WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="5")
    assert announced() == Place(1, 1, 4, "a", 5, "RANK=1 and WORLD_SIZE=4")


def test_ports_are_below_those_of_outgoing_connections():
    first, count = PORTS
    assert all(first <= port_of(text) < first + count <= 32_768 for text in ("0", "39999", "1" * 30, "/runs/a", "/runs/b"))
    assert port_of("/runs/ab") != port_of("/runs/ba")


def test_who_is_missing_is_told_and_waited_for_until_the_timeout(monkeypatch, capfd):
    """A shell in which RANK and WORLD_SIZE are left over: not a byte of output before."""
    monkeypatch.setattr(joining, "TELL_S", 0.2)
    for rank, missing in ((0, "ranks 1, 2 of 3"), (1, "rank 0 of 3")):
        monkeypatch.setattr(joining, "_connected", [])
        place = Place(rank, 0, 3, "127.0.0.1", free_port(), f"RANK={rank} and WORLD_SIZE=3")
        with pytest.raises(MachineError) as error:
            joining.join(place, "/runs/a", 1.0)
        assert f"{missing} did not come to {place.where} in 1 s (distributed.join_timeout_s)" in str(error.value)
        assert "env -u RANK -u WORLD_SIZE COMMAND" in str(error.value)
        told = capfd.readouterr().err
        assert missing.removesuffix(" of 3") in told and f"RANK={rank} and WORLD_SIZE=3 say so" in told and "frame #" not in told


def test_a_command_with_leftovers(settings, tmp_path):
    left = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = run_command("train", str(write_config(settings, tmp_path)), "distributed.join_timeout_s=0.5", **left)
    assert done.returncode == 6 and done.stderr.count("\n") == 1 and "rank 0 of 2 did not come" in done.stderr
    assert not (tmp_path / "runs").exists()


def together(*joiners) -> list[object]:
    """Each in a thread of its own: what it returned or raised, in order."""
    found: list[object] = [None] * len(joiners)

    def one(number: int) -> None:
        try:
            found[number] = joiners[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(joiners))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


class NotKept(list):
    """As if every rank were a process of its own."""

    def __bool__(self) -> bool:
        return False


def test_another_runs_rank_leaves_and_harms_nobody(monkeypatch):
    """Two starts on one port, as deepspeed's 29500: the loser's ranks each end with a line, the winner's find one another."""
    monkeypatch.setattr(joining, "_connected", NotKept())
    port = free_port()
    first, second = [Place(rank, 0, 2, "127.0.0.1", port, "") for rank in (0, 1)]

    def later(place: Place, run: str):
        joining._await_first(place, 20)
        return joining.join(place, run, 20)

    found = together(
        lambda: joining.join(first, "/runs/a", 20),
        lambda: later(second, "/runs/b"),
        lambda: later(first, "/runs/b"),
        lambda: later(second, "/runs/a"),
    )
    assert not isinstance(found[0], Exception) and not isinstance(found[3], Exception), found
    assert "where the run /runs/a meets; it leaves without harm" in str(found[1])
    assert f"port {port} (MASTER_PORT) of this machine is in use" in str(found[2])
    with pytest.raises(MachineError, match="rank 1 of 2 is there twice"):
        joining.join(second, "/runs/a", 5)


def test_a_mistake_of_all_ranks_is_told_by_one(monkeypatch):
    monkeypatch.setattr(joining, "_connected", NotKept())
    say(monkeypatch, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=(port := str(free_port())))
    places = iter([Place(rank, 0, 2, "127.0.0.1", int(port), "") for rank in (0, 1)])
    monkeypatch.setattr(mistakes, "announced", lambda: next(places))
    told: list[str] = []
    together(*[lambda: mistakes.told_once(ConfigError("optim.lrr: no such key"), lambda error: told.append(str(error)))] * 2)
    assert told == ["optim.lrr: no such key"]


FIRST = (
    "import sys; from vlm_dist import joining, launched; joining.join(launched.Place(0, 0, 3, '127.0.0.1', int(sys.argv[1]), ''), 'a', 60)"
)


def test_the_first_rank_is_killed_while_another_waits(capfd):
    """One line, at once, instead of torch's pages of C++."""
    place = Place(1, 0, 3, "127.0.0.1", free_port(), "RANK=1 and WORLD_SIZE=3")
    process = subprocess.Popen([sys.executable, "-c", FIRST, str(place.port)], cwd=ROOT, env=child_environment())
    killing = threading.Thread(target=lambda: (joining._await_first(place, 60), threading.Event().wait(1), process.kill()))
    killing.start()
    with pytest.raises(MachineError, match=r"rank 0 has left 127.0.0.1:\d+ before all 3 ranks had come; .* env -u RANK -u WORLD_SIZE"):
        joining.join(place, "a", 60)
    killing.join()
    process.wait()
    told: list[str] = []
    together(lambda: mistakes.told_once(ConfigError("a mistake"), lambda error: told.append(str(error))))
    assert "frame #" not in capfd.readouterr().err


def test_ctrl_c_while_another_rank_is_awaited():
    """By a rank that is not the first, which waits inside torch: there it is heard only when the wait is over."""
    place = Place(1, 0, 3, "127.0.0.1", free_port(), "")
    store = dist.TCPStore(place.host, place.port, 3, True, timedelta(seconds=60), wait_for_workers=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            joining._word(store, "all", place, began + 30, 30)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("http://10.0.0.10:8265", "RAY_ADDRESS: 'http://10.0.0.10:8265' is a dashboard's address, to which jobs are sent"),
        ("ray://10.0.0.10:10001", "is an address of Ray Client, through which no run can be watched"),
        ("10.0.0.10", "RAY_ADDRESS: '10.0.0.10' is no address of a cluster; expected HOST:PORT of the head"),
    ],
)
def test_what_ray_is_named_by(monkeypatch, address, told):
    """`ray job` takes a dashboard's address from RAY_ADDRESS, so shells have it."""
    say(monkeypatch, RAY_ADDRESS=address)
    with pytest.raises(ConfigError) as error:
        ray_cluster.connect(RayConfig())
    assert told in str(error.value) and str(error.value).endswith("env -u RAY_ADDRESS COMMAND") and "\n" not in str(error.value)


def test_the_first_rank_gives_up_and_tells_for_all(monkeypatch):
    monkeypatch.setattr(joining, "_connected", NotKept())
    port = free_port()
    first, second = (Place(rank, 0, 3, "127.0.0.1", port, "") for rank in (0, 1))
    found = together(lambda: joining.join(first, "/runs/a", 2), lambda: joining.join(second, "/runs/a", 2))
    assert "rank 2 of 3 did not come" in str(found[0]) == str(found[1])
    assert [isinstance(error, MachineError) and error.told for error in found] == [False, True]


def test_on_one_machine_no_network_is_chosen(monkeypatch, capfd):
    """Whatever its own name leads to; between machines: test_hosts.py."""
    monkeypatch.setattr(joining, "_connected", NotKept())
    monkeypatch.setattr(networks, "own_address", lambda: "127.0.1.1")
    monkeypatch.delenv(networks.CHOSEN_BY, raising=False)
    host, port = networks.address_towards("198.51.100.1") or "127.0.0.1", free_port()
    found = together(*[lambda rank=rank: joining.join(Place(rank, 0, 2, host, port, ""), "/runs/a", 20) for rank in (0, 1)])
    assert not any(isinstance(one, Exception) for one in found), found
    assert networks.CHOSEN_BY not in os.environ and capfd.readouterr().err == ""


@pytest.mark.parametrize(("rank", "says"), [("0", "no other of the 2 ranks met this at"), ("1", "rank 1 of 2 waits for rank 0 at")])
def test_a_mistake_where_variables_are_left_over(monkeypatch, capfd, rank, says):
    """15 s of silence before: a line says which variables are there, and how to leave them out."""
    monkeypatch.setattr(mistakes, "WAIT_S", 0.3)
    say(monkeypatch, RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    told: list[str] = []
    together(lambda: mistakes.told_once(ConfigError("a mistake"), lambda error: told.append(str(error))))
    lines = capfd.readouterr().err.splitlines()
    assert told == ["a mistake"] and len(lines) == 1 and says in lines[0]
    assert f"(RANK={rank} and WORLD_SIZE=2 say" in lines[0] and lines[0].endswith("env -u RANK -u WORLD_SIZE COMMAND")


def test_commands_that_are_no_rank_ask_nobody(monkeypatch, capfd, tmp_path):
    """In a shell of a pod that has RANK, while the training of that pod goes on."""
    say(monkeypatch, RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(mistakes, "connected", never)
    for command in (
        ["report", str(tmp_path / "none")],
        ["plan", str(tmp_path / "none.yaml")],
        ["export", str(tmp_path), "--to", "adapter"],
    ):
        assert main(command) == 2 and capfd.readouterr().err.startswith("vlm-dist: "), command


AT_ITS_END = """
import atexit, sys
import torch.distributed as dist
from vlm_dist import distributed
atexit.register(lambda: print(dist.is_initialized()))
ranks = distributed.start()
distributed.stop_at_exit()
if sys.argv[1] == "fails":
    distributed.start()
"""


@pytest.mark.parametrize("how", ["well", "fails"])
def test_the_group_is_left_at_the_end(how):
    """Before Python is taken down, when gloo's threads could abort; not where a later start failed, whose others it would wait for."""
    words = [sys.executable, "-c", AT_ITS_END, how]
    done = subprocess.run(words, env=child_environment(), capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split()) == (0, [str(how == "fails")]), done.stderr
