"""The Ray cluster that a run is given: joined or started, and how many workers it has room for."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.config import Config, RayConfig
from vlm_dist.deepspeed_config import check_batches
from vlm_dist.errors import ConfigError, MachineError, tell, words_of
from vlm_dist.redaction import redacted
from vlm_dist.training.ray_stop import signals_held
from vlm_dist.upstream.ray import ADDRESS, free_by_node

PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "WANDB_MODE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS",
             "GLOO_SOCKET_IFNAME")  # fmt: skip  # no secrets: Ray shows them
TELL_S = 10.0  # between two lines of a run that waits
LOCAL = "local"
HOST_AND_PORT = re.compile(r"[^/\s]+:\d{1,5}")


@dataclass(frozen=True)
class Workers:
    """The group that is asked for."""

    allowed: list[int]
    """Numbers of workers that the batch can be cut for, ascending."""
    needs: dict[str, float]
    """What each reserves on one node."""

    @property
    def number(self) -> int | tuple[int, int]:
        """As Ray takes it: one number, or the bounds."""
        return self.allowed[0] if len(self.allowed) == 1 else (self.allowed[0], self.allowed[-1])

    @property
    def use_gpu(self) -> bool:
        return "GPU" in self.needs

    def room(self, nodes: list[dict[str, float]]) -> int:
        """How many there is room for, where nodes have so much."""
        return sum(int(min(node.get(name, 0.0) // amount for name, amount in self.needs.items())) for node in nodes)

    def waiting_in_words(self) -> str:
        """Who waits for what."""
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.needs.items())
        free = free_by_node()
        left = ", ".join(f"{sum(node.get(name, 0.0) for node in free):g} {name}" for name in self.needs)
        return (
            f"{self.allowed[0]} workers are asked for, each with {each} on one node; the cluster has room for {self.room(free)} "
            f"(free on {len(free)} nodes: {left})"
        )


def connect(config: RayConfig) -> bool:
    """Join a running cluster, or start one (docs/security.md says where it listens); returns whether it was there before.

    Raises:
        ConfigError: what names a cluster is no address of one.
        MachineError: the cluster that is named does not answer, or a new one does not come up.
    """
    address = config.address or os.environ.get(ADDRESS) or _cluster_here()
    _refuse_other_addresses(address, "ray.address" if config.address else ADDRESS)
    import ray

    environment = {name: os.environ[name] for name in os.environ if name in PASSED_ON or name.startswith("NCCL_")}
    environment = {name: redacted(value) for name, value in environment.items()}
    environment["PYTHONPATH"] = os.pathsep.join(_python_path())
    try:
        with signals_held():
            ray.init(address=address, runtime_env={"env_vars": environment}, log_to_driver=True, logging_level=logging.WARNING)
    except ConnectionError as error:
        why = str(error).splitlines()[0][:200]
        raise MachineError(
            f"ray.address: no cluster answers at '{address}' ({why}); is it running, and does it ask for a token (RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token)?"
        ) from None
    except Exception as error:
        if type(error) is not Exception:  # as Ray itself raises where its processes do not come up in half a minute
            raise
        raise MachineError(
            f"ray: no cluster comes up on this machine ({words_of(error)}); where it is only busy, run again, else Ray's own logs say why"
        ) from None
    return address != LOCAL


def _refuse_other_addresses(address: str, said_by: str) -> None:
    """Raises:
    ConfigError: it is a dashboard's, as `ray job` takes it from the same variable, or of Ray Client.
    """
    if address in ("auto", LOCAL) or HOST_AND_PORT.fullmatch(address):
        return
    what = "no address of a cluster"
    if address.startswith(("http://", "https://")):
        what = "a dashboard's address, to which jobs are sent (vlm-dist launch --ray --address URL)"
    elif address.startswith("ray://"):
        what = "an address of Ray Client, through which no run can be watched"
    leave = "" if said_by != ADDRESS else f"; without it: env -u {ADDRESS} COMMAND"
    raise ConfigError(f"{said_by}: '{redacted(address)}' is {what}; expected HOST:PORT of the head (often port 6379), auto or local{leave}")


def _cluster_here() -> str:
    """The cluster that `ray start` noted on this machine, if it still answers (Ray itself would wait minutes for a dead one), else a new
    one."""
    note = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    if not note.exists():
        return LOCAL
    host, _, port = note.read_text().strip().rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return LOCAL
    return "auto"


def _python_path() -> list[str]:
    """Where workers find vlm_dist and vlm_kernels if they are not installed there: beside this file."""
    root = Path(__file__).resolve().parents[2]
    return [str(root), *([str(root / "kernels")] if _is_repository(root) else [])]


def _is_repository(folder: Path) -> bool:
    return (folder / "kernels" / "vlm_kernels").is_dir()


def leave_repository() -> None:
    """On a worker, before any other library is loaded: take the repository's root off the path, where this package was found, as Ray took
    the driver's folder and the copy sent to a job. From there `kernels/` would pass for Hugging Face's package of that name."""
    sys.path[:] = [place for place in sys.path if not _is_repository(Path(place))]


def refuse_sent_copy(config: Config, here: Path) -> None:
    """Inside a job to which the working directory was sent: that copy is deleted with the job.

    Args:
        here: the current folder as the job began. Ray 2.60 may unpack the copy anew when the job connects, and then there is none.

    Raises:
        ConfigError: the run would be written into it.
    """
    import ray

    output = Path(os.path.normpath(here / config.output_dir))
    if ray.get_runtime_context().runtime_env.get("working_dir") and output.is_relative_to(here):
        raise ConfigError(
            f"output_dir: '{config.output_dir}' is in the copy of the working directory that Ray made for this job ({here}) and deletes "
            "after it; give an absolute path on storage that every node sees"
        )


def workers_of(config: Config) -> Workers:
    """The numbers of workers that may be used, and what each reserves.

    Raises:
        ConfigError: the batch cannot be cut for any of them.
    """
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    use_gpu = gpus > 0 if config.ray.use_gpu is None else config.ray.use_gpu
    most = config.ray.workers or max(1, gpus if use_gpu else 1)
    least = config.ray.min_workers or most
    if least > most:
        raise ConfigError(f"ray.min_workers={least} is more than ray.workers={most}")
    allowed = [number for number in range(least, most + 1) if _divides(config, number)]
    if not allowed:
        check_batches(config, most)
    if len(allowed) <= most - least:
        tell(f"ray: of {least} to {most} workers only {_listed(allowed)} can share a global batch of {config.training.global_batch}")
    return Workers(allowed, {"CPU": config.ray.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})})


def wait_for_room(workers: Workers, config: RayConfig, *, can_grow: bool, stopped: Callable[[], bool]) -> None:
    """Return when the smallest group has room, or when the run is asked to stop; meanwhile tell who waits for what.

    Args:
        can_grow: whether others may join the cluster or leave room; a new one of this machine stays as it is.

    Raises:
        MachineError: `ray.wait_s` is over.
    """
    began = told = time.monotonic()
    while workers.room(free_by_node()) < workers.allowed[0] and not stopped():
        now = time.monotonic()
        if not can_grow or now - began >= config.wait_s:
            waited = f" after {config.wait_s:g} s (ray.wait_s)" if can_grow else ""
            raise MachineError(f"ray.workers: {workers.waiting_in_words()}{waited}; {_less(workers)}")
        if now - told >= TELL_S or told == began:
            tell(f"ray: waiting up to {config.wait_s - (now - began):.0f} s more: {workers.waiting_in_words()}")
            told = now
        time.sleep(min(0.5, config.wait_s))


def _less(workers: Workers) -> str:
    other = "start nodes with GPUs, or ray.use_gpu=false" if workers.use_gpu else "lower ray.cpus_per_worker"
    return f"ask for fewer, {other}"


def _divides(config: Any, number: int) -> bool:
    try:
        check_batches(config, number)
    except ConfigError:
        return False
    return True


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) < 10 else f"{numbers[0]}, {numbers[1]} ... {numbers[-1]} ({len(numbers)} numbers)"
