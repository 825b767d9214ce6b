"""What a launcher says of this process, read from its variables: torchrun, deepspeed and Ray set RANK and its kin, srun its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.errors import MachineError, warn

PORTS = 20_000, 10_000  # the first and how many: below those that the system gives to outgoing connections


@dataclass(frozen=True)
class Place:
    """One process among others."""

    rank: int
    local_rank: int
    world_size: int
    host: str
    port: int
    said_by: str
    """The variables that say so, for people."""

    @property
    def where(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    @property
    def hint(self) -> str:
        """What to do where no launcher meant this process."""
        return alone([part.partition("=")[0] for part in self.said_by.split(" and ")])


def bracketed(host: str) -> str:
    """A host as it stands before a colon and a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def announced() -> Place:
    """The place that the launcher announced, without starting anything; a world of one where there is no launcher.

    Raises:
        MachineError: the variables are no numbers, or do not agree.
    """
    values = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    names = {name: name for name in values}
    if "RANK" not in values and "WORLD_SIZE" not in values:
        values, names = values | _from_slurm(), names | dict(_SLURM)
    rank, world_size = (_number(name, names, values) for name in ("RANK", "WORLD_SIZE"))
    if (rank is None) != (world_size is None) and (rank, world_size) not in ((0, None), (None, 1)):
        there, missing = ("RANK", "WORLD_SIZE") if world_size is None else ("WORLD_SIZE", "RANK")
        raise MachineError(f"{there}={values[there]} is set, but {missing} is not; {_unset(names)}")
    rank, world_size = rank or 0, 1 if world_size is None else world_size
    said_by = " and ".join(f"{names[name]}={values[name]}" for name in ("RANK", "WORLD_SIZE") if name in values)
    if world_size < 1 or rank >= world_size:
        raise MachineError(f"{said_by}: ranks are counted from 0 to WORLD_SIZE - 1; {_unset(names)}")
    local = _number("LOCAL_RANK", names, values)
    if world_size == 1:
        return Place(0, local or 0, 1, "127.0.0.1", 0, said_by)
    return Place(rank, local or 0, world_size, *_meeting_point(names, values, said_by), said_by)


def left_over() -> str | None:
    """For a process that no launcher started: what is wrong with the variables, or what it would wait for. None: nothing."""
    try:
        place = announced()
    except MachineError as error:
        return str(error)
    if place.world_size == 1:
        return None
    return f"{place.said_by}: a training begun here waits for {place.world_size - 1} other ranks at {place.where}; {place.hint}"


def start_id() -> str:
    """What all ranks of one start have in common and those of another have not, as far as their launcher has such a thing."""
    for names in (("TORCHELASTIC_RUN_ID",), ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")):
        if names[0] in os.environ and (names[0] != "SLURM_JOB_ID" or _from_slurm()):
            return "/".join(os.environ.get(name, "") for name in names)
    if os.environ.get("CROSS_SIZE") == "1":  # deepspeed on one node: the process that starts the ranks; its starts on several share nothing
        return f"{socket.gethostname()}/{_starter()}"
    return ""


def note_saved() -> None:
    """Tell launch/slurm/train.sbatch, where it waits for it, that this start of the run has come further: so it queues the job again."""
    if place := os.environ.get("VLM_DIST_SAVED"):
        try:
            Path(place).touch()
        except OSError as error:
            warn(f"VLM_DIST_SAVED: '{place}' cannot be written ({error.strerror}); the job is not queued again after its time limit")


def _starter() -> int:
    """The number of deepspeed's launcher, above whatever shell or profiler it starts ranks in; else of the process above this one."""
    number = os.getppid()
    while number > 1:
        try:
            words = Path(f"/proc/{number}/cmdline").read_bytes()
            if b"deepspeed.launcher.launch" in words:
                return number
            number = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    return os.getppid()


def alone(names: Iterable[str]) -> str:
    """How to leave these variables out."""
    return f"to train in this process alone: env {' '.join(f'-u {name}' for name in names)} COMMAND"


_SLURM = (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"), ("LOCAL_RANK", "SLURM_LOCALID"), ("JOB", "SLURM_JOB_ID"))


def _from_slurm() -> dict[str, str]:
    """The variables of a task that srun started; nothing elsewhere, such as in a batch script or an interactive allocation."""
    if any(name not in os.environ for _, name in _SLURM):
        return {}
    return {ours: os.environ[theirs] for ours, theirs in _SLURM}


def _number(name: str, names: dict[str, str], values: dict[str, str]) -> int | None:
    if name not in values:
        return None
    try:
        if (number := int(values[name])) >= 0:
            return number
    except ValueError:
        number = -1
    raise MachineError(f"{names[name]}='{values[name]}' is set, expected a whole number of 0 or more; {_unset(names)}")


def _meeting_point(names: dict[str, str], values: dict[str, str], said_by: str) -> tuple[str, int]:
    port = _number("MASTER_PORT", names, values)
    if port is not None and not 1 <= port <= 65_535:
        raise MachineError(f"{names['MASTER_PORT']}='{port}' is set, expected a port of 1 to 65535; {_unset(names)}")
    if "JOB" in values:
        port = port if port is not None else port_of(values["JOB"])
        if int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) > 1 and not values.get("MASTER_ADDR"):
            raise MachineError(
                "srun on several nodes: MASTER_ADDR is not set; export the first node's name, as launch/slurm/train.sbatch does"
            )
        return values.get("MASTER_ADDR") or "127.0.0.1", port
    if port is None or not values.get("MASTER_ADDR"):
        missing = "MASTER_PORT" if port is None else "MASTER_ADDR"
        raise MachineError(f"{said_by}: one of several ranks, but {missing} is not set; {_unset(names)}")
    return values["MASTER_ADDR"], port


def port_of(text: str) -> int:
    """A port that is a function of a text, such as a job's number."""
    first, count = PORTS
    return first + (int(text) if text.isdigit() else sum((place + 1) * byte for place, byte in enumerate(text.encode()))) % count


def _unset(names: dict[str, str]) -> str:
    left = [names[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in names]
    return f"left over from another launcher? {alone(left)}"
