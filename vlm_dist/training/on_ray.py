"""The same `train(config)` as a Ray Train job: Ray places one worker a rank, watches them, and starts them again when one is lost.

Ray's own checkpoints are not used: a restarted group finds the newest good checkpoint in the run directory, as any other start does.
So the run directory must lie where every node sees it.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vlm_dist.config import Config, RayConfig
from vlm_dist.deepspeed_config import check_batches
from vlm_dist.errors import ConfigError, MachineError, UserError
from vlm_dist.redaction import redacted
from vlm_dist.run_dir import RunDir

PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "WANDB_MODE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")  # no secrets: Ray shows them


MISTAKE_TIMEOUT_S = 15  # until every rank has met a mistake that all will meet


class _Outcome:
    """An actor that remembers how the run ended: what workers return, Ray does not hand on."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config  # kept here, since Ray shows a job's settings
        self.summary: dict[str, Any] | None = None
        self.mistake: tuple[str, int] | None = None
        self.told = 0

    def what(self) -> dict[str, Any]:
        return self.config

    def finish(self, summary: dict[str, Any]) -> None:
        self.summary = summary

    def fail(self, message: str, exit_code: int) -> None:
        self.mistake = self.mistake or (message, exit_code)
        self.told += 1

    def ranks_that_told(self) -> int:
        return self.told

    def get(self) -> tuple[dict[str, Any] | None, tuple[str, int] | None]:
        return self.summary, self.mistake


def train_on_ray(config: Config, *, resume_anyway: bool = False) -> dict[str, Any]:
    """Train on a Ray cluster; a new one on this machine where none is running.

    Returns:
        The content of summary.json.

    Raises:
        UserError: as `train` raises on a worker (which is then not started again), or workers were lost more often than allowed.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    _connect(config.ray)
    try:
        workers, use_gpu = _workers(config)
        reserved = {"CPU": config.ray.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # not on a node that may be lost
        outcome = ray.remote(num_cpus=0)(_Outcome).options(scheduling_strategy=here).remote(config.model_dump(mode="json"))
        run = RunDir(Path(config.output_dir) / config.name)
        trainer = TorchTrainer(
            _work,
            train_loop_config={"cwd": os.getcwd(), "again": resume_anyway, "outcome": outcome},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=reserved),
            run_config=RunConfig(
                name=config.name, storage_path=str((run.path / "ray").resolve()), failure_config=FailureConfig(config.ray.max_failures)
            ),
        )
        return _fit(trainer, outcome)
    finally:
        ray.shutdown()


def _fit(trainer: Any, outcome: Any) -> dict[str, Any]:
    import ray
    from ray.train import TrainingFailedError

    problem = None
    try:
        trainer.fit()
    except TrainingFailedError as error:
        problem = str(error).strip().splitlines()[-1][:300]
    summary, mistake = ray.get(outcome.get.remote())
    if mistake is not None:
        error = UserError(mistake[0])
        error.exit_code = mistake[1]
        raise error
    if summary is None:
        raise MachineError(
            f"ray: the workers failed ({problem}); their words are in the run's logs/ and in Ray's dashboard. Run again to continue"
        )
    return summary


def _connect(config: RayConfig) -> None:
    """Join a running cluster, or start one (docs/security.md says where it listens)."""
    import ray

    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment = {name: redacted(value) for name, value in environment.items()}
    environment["PYTHONPATH"] = os.pathsep.join(_python_path())
    address = config.address or os.environ.get("RAY_ADDRESS") or _cluster_here()
    try:
        ray.init(address=address, runtime_env={"env_vars": environment}, log_to_driver=True, logging_level=logging.WARNING)
    except ConnectionError as error:
        why = str(error).splitlines()[0][:200]
        raise MachineError(
            f"ray.address: no cluster answers at '{address}' ({why}); is it running, and does it ask for a token (RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token)?"
        ) from None


def _cluster_here() -> str:
    """The cluster that `ray start` noted on this machine, if it still answers (Ray itself would wait minutes for a dead one), else a new
    one."""
    note = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    if not note.exists():
        return "local"
    host, _, port = note.read_text().strip().rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return "local"
    return "auto"


def _python_path() -> list[str]:
    """Where workers find vlm_dist and vlm_kernels if they are not installed there: beside this file."""
    root = Path(__file__).resolve().parents[2]
    return [str(root), str(root / "kernels")]


def _workers(config: Config) -> tuple[int | tuple[int, int], bool]:
    """The number of workers, or its bounds, and whether each has a GPU.

    Raises:
        ConfigError: the batch cannot be cut for some allowed number of workers.
        MachineError: the cluster has fewer CPUs or GPUs than the workers reserve.
    """
    import ray

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    most = config.ray.workers or max(1, gpus)
    least = config.ray.min_workers or most
    if least > most:
        raise ConfigError(f"ray.min_workers={least} is more than ray.workers={most}")
    for number in range(least, most + 1):
        check_batches(config, number)
    have = gpus if gpus else int(resources.get("CPU", 0) // config.ray.cpus_per_worker)
    if have < least:
        raise MachineError(
            f"ray.workers: {least} workers are asked for, the cluster has room for {have} ({gpus} GPUs, {resources.get('CPU', 0):g} CPUs); "
            "ask for fewer, or lower ray.cpus_per_worker"
        )
    return (least, most) if least < most else most, gpus > 0


def _work(settings: dict[str, Any]) -> None:
    """One rank. A mistake of the user's ends the run: when every rank has met it, all return, and there is nothing to start again."""
    import ray
    from ray.train import get_context

    from vlm_dist.training.lost import RankLost
    from vlm_dist.training.train import train

    outcome, context = settings["outcome"], get_context()
    if ray.get(outcome.get.remote())[1] is not None:  # a rank met it alone, and Ray started the group again
        return
    os.chdir(settings["cwd"])
    try:
        summary = train(Config(**ray.get(outcome.what.remote())), resume_anyway=settings["again"])
    except RankLost:  # no mistake: Ray starts the others again
        raise
    except UserError as error:
        ray.get(outcome.fail.remote(str(error), error.exit_code))
        for _ in range(MISTAKE_TIMEOUT_S * 5):
            if ray.get(outcome.ranks_that_told.remote()) == context.get_world_size():
                return
            time.sleep(0.2)
        error.args = (redacted(str(error)),)  # Ray prints it
        raise  # the others wait for this rank: Ray must end them
    finally:
        sys.stdout.flush()
    if context.get_world_rank() == 0:
        ray.get(outcome.finish.remote(summary))
