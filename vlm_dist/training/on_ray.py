"""The same `train(config)` as a Ray Train job: Ray places one worker a rank, watches them, and starts them again when one is lost.

Ray's own checkpoints are not used: a restarted group finds the newest good checkpoint in the run directory, as any other start does.
So the run directory must lie where every node sees it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_dist.config import Config
from vlm_dist.errors import MachineError, UserError, tell
from vlm_dist.quiet import quiet_libraries
from vlm_dist.redaction import redacted
from vlm_dist.run_dir import RunDir
from vlm_dist.training.health import StopRequest
from vlm_dist.training.ray_cluster import TELL_S, Workers, connect, leave_repository, refuse_sent_copy, wait_for_room, workers_of
from vlm_dist.training.ray_stop import Asked, leave_drained_node, signals_held
from vlm_dist.upstream.ray import address_told, trainer_class

SILENT_S = 30  # a worker starts in less
MISTAKE_TIMEOUT_S = 15  # until every rank has met a mistake that all will meet


class _Outcome:
    """An actor between driver and workers: what workers return, Ray does not hand on, and signals do not reach them."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config  # kept here, since Ray shows a job's settings
        self.summary: dict[str, Any] | None = None
        self.mistake: tuple[str, int] | None = None
        self.told = 0
        self.stop_signal: int | None = None
        self.begun = False
        self.heard = time.monotonic()

    def what(self) -> dict[str, Any]:
        return self.config

    def finish(self, summary: dict[str, Any]) -> None:
        self.summary = summary

    def fail(self, message: str, exit_code: int) -> None:
        self.mistake = self.mistake or (message, exit_code)
        self.told += 1

    def ranks_that_told(self) -> int:
        return self.told

    def stop(self, number: int) -> bool:
        """Ask the workers to save and end; returns whether there is anything to save."""
        self.stop_signal = number
        return self.begun

    def begin(self) -> None:
        self.begun = True

    def asked(self) -> int | None:
        """Asked by the first rank all the time."""
        self.heard = time.monotonic()
        return self.stop_signal

    def silent_s(self) -> float:
        return time.monotonic() - self.heard

    def get(self) -> tuple[dict[str, Any] | None, tuple[str, int] | None]:
        return self.summary, self.mistake


def train_on_ray(
    config: Config, *, resume_anyway: bool = False, instead: Callable[[Config], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Train on a Ray cluster; a new one on this machine where none is running.

    Args:
        instead: what the workers do, if not train; it returns what this function returns.

    Returns:
        The content of summary.json.

    Raises:
        UserError: as `train` raises on a worker (which is then not started again), or workers were lost more often than allowed.
    """
    import ray

    here = Path.cwd()
    try:
        with signals_held():
            can_grow = connect(config.ray)
            stop = StopRequest().__enter__()  # Ray has set handlers of its own
        with stop, address_told():
            refuse_sent_copy(config, here)
            workers = workers_of(config)
            settings = {"again": resume_anyway, "instead": instead, "cwd": str(here)}
            wait_for_room(workers, config.ray, can_grow=can_grow, stopped=lambda: stop.requested)
            return _interrupted(stop) if stop.requested else _fit(config, workers, stop, settings)
    finally:
        ray.shutdown()


def _fit(config: Config, workers: Workers, stop: StopRequest, settings: dict[str, Any]) -> dict[str, Any]:
    import ray
    from ray.train import TrainingFailedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # not on a node that may be lost
    outcome = ray.remote(num_cpus=0)(_Outcome).options(scheduling_strategy=here).remote(config.model_dump(mode="json"))
    trainer = _trainer(config, workers, settings | {"outcome": outcome})
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)  # this one keeps its ears open
    thread.start()
    if not _wait(thread, outcome, stop, workers):
        return _interrupted(stop)
    if failed and not isinstance(failed[0], TrainingFailedError):
        raise failed[0]
    summary, mistake = ray.get(outcome.get.remote())
    if mistake is not None:
        error = UserError(mistake[0])
        error.exit_code = mistake[1]
        raise error
    if summary is None and stop.requested:
        return _interrupted(stop)
    if summary is None:
        problem = str(failed[0]).strip().splitlines()[-1][:300] if failed else None
        raise MachineError(
            f"ray: the workers failed ({problem}); their words are in the run's logs/ and in Ray's dashboard. Run again to continue"
        )
    return summary


def _trainer(config: Config, workers: Workers, settings: dict[str, Any]) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    run = RunDir(Path(config.output_dir) / config.name)
    return trainer_class(workers.allowed)(
        _work,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if workers.use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers.number, use_gpu=workers.use_gpu, resources_per_worker=workers.needs),
        run_config=RunConfig(
            name=config.name, storage_path=str((run.path / "ray").resolve()), failure_config=FailureConfig(config.ray.max_failures)
        ),
    )


def _wait(thread: threading.Thread, outcome: Any, stop: StopRequest, workers: Workers) -> bool:
    """Until Ray Train has ended. Hands on what this process is asked; False: it was asked before there was anything to save."""
    import ray

    asked, looked = False, time.monotonic()
    while thread.is_alive():
        thread.join(0.2)
        if stop.requested and not asked:
            asked = True
            if not ray.get(outcome.stop.remote(stop.signal)):
                return False
            tell(f"{signal.Signals(stop.signal or 0).name}: the workers finish their step, save and end")
        if time.monotonic() - looked > TELL_S and thread.is_alive():
            looked = time.monotonic()
            if (silent := ray.get(outcome.silent_s.remote())) > SILENT_S:
                tell(f"ray: the first worker was not heard of for {silent:.0f} s: {workers.waiting_in_words()}")
    return True


def _interrupted(stop: StopRequest) -> dict[str, Any]:
    """Before there was anything to save."""
    name = signal.Signals(stop.signal or signal.SIGTERM).name
    tell(f"interrupted by {name} before training began; nothing is lost")
    return {"ended": "interrupted", "signal": name}


def _work(settings: dict[str, Any]) -> None:
    """One rank. A mistake of the user's ends the run: when every rank has met it, all return, and there is nothing to start again."""
    import ray
    from ray.train import get_context

    leave_repository()
    quiet_libraries()
    logging.getLogger("vlm_dist").propagate = False  # Ray Train's handler at the root prints to the screen too: every line came twice
    from vlm_dist.training.lost import RankLost
    from vlm_dist.training.train import train

    outcome, context = settings["outcome"], get_context()
    asked = Asked(outcome, context.get_world_rank())
    if ray.get(outcome.get.remote())[1] is not None:  # a rank met it alone, and Ray started the group again
        return
    os.chdir(settings["cwd"])
    try:
        config = Config(**ray.get(outcome.what.remote()))
        instead = settings["instead"]
        summary = instead(config) if instead else train(config, resume_anyway=settings["again"], asked=asked)
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
        asked.close()
        sys.stdout.flush()
    if summary["ended"] == "interrupted" and ray.get(outcome.asked.remote()) is None:
        leave_drained_node()
    if context.get_world_rank() == 0:
        ray.get(outcome.finish.remote(summary))
