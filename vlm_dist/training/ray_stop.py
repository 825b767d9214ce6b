"""How a run on Ray is asked to stop. Signals reach the driver alone, so it tells an actor, which the first rank asks; that a node will be
taken away (a spot machine, `ray drain-node`) Ray itself tells the ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlm_dist.upstream.ray import preemption_notice

LOOK_S = 0.5
NOTICED_S = 10.0  # until Ray knows which workers the node took with it
HELD = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Asked:
    """What `train` looks at on a worker: the number of a signal, or None. The first look says that training has begun.

    Args:
        outcome: the actor that the driver tells.
        rank: the first looks for all, since one that is asked is enough.
    """

    def __init__(self, outcome: Any, rank: int) -> None:
        self._outcome, self._is_first = outcome, rank == 0
        self._number: int | None = None
        self._begun = False
        self._done = threading.Event()
        if self._is_first:
            threading.Thread(target=self._look, name="asked-to-stop", daemon=True).start()

    def __call__(self) -> int | None:
        import ray

        if self._is_first and not self._begun:
            self._begun = True
            ray.get(self._outcome.begin.remote())
        return signal.SIGTERM if preemption_notice() is not None else self._number

    def close(self) -> None:
        self._done.set()

    def _look(self) -> None:
        import ray
        from ray.exceptions import RayError

        while not self._done.wait(LOOK_S):
            try:
                self._number = ray.get(self._outcome.asked.remote())
            except RayError:
                return  # the driver is gone; Ray ends its workers


def leave_drained_node() -> None:
    """The run is saved: end this worker so that Ray starts the group again on other nodes, and does not count it as a failure.

    Raises:
        RuntimeError: on the ranks of other nodes.
    """
    from ray.train import get_context

    notice = preemption_notice()  # None where the word has reached another rank alone
    if notice is not None and get_context().get_world_rank() in notice.preempted_ranks:
        os._exit(1)
    time.sleep(NOTICED_S)
    raise RuntimeError("another worker's node is taken away; the run is saved and goes on")


@contextmanager
def signals_held() -> Iterator[None]:
    """Signals to this process wait. What it starts here (Ray's own processes, where there is no cluster) never gets them: a scheduler sends
    SIGTERM to all processes of a job, a closed terminal SIGHUP, and without those no worker could save."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
