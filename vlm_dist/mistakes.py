"""A mistake that several ranks meet is told by one of them, once, however often a launcher starts them."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from vlm_dist.errors import ConfigError, DataError, MachineError, ModelError, UserError, warn
from vlm_dist.joining import MISTAKE, connected, is_of_agent, telling
from vlm_dist.launched import Place, announced

WAIT_S = 5.0  # the first rank keeps the store so long for the others
LASTING = (ConfigError, DataError, ModelError)  # a new start does not mend them


def told_once(error: UserError, say: Callable[[UserError], object]) -> None:
    """Call `say`, on the first of the ranks that meet this error. Every rank then ends with its own exit code, although launchers send
    SIGTERM to all when one has ended. Where variables say that there are other ranks and none comes, a line says which variables."""
    try:
        place = announced()
    except MachineError:
        place = None
    if place is None or place.world_size == 1 or error.of_one:
        say(error)
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    store = _store(place)
    if store is None or _is_first(store, str(error)):
        say(error)
    if store is not None:
        _leave(store, place, error)


def _store(place: Place) -> Any:
    """Where the ranks of this start agree on who tells; None: there is nobody to agree with."""
    try:
        with telling(place, WAIT_S):
            store = connected(place, 2 * WAIT_S)
    except MachineError:
        return None
    store.set_timeout(timedelta(seconds=WAIT_S))
    return store


def _is_first(store: Any, text: str) -> bool:
    try:
        return store.add(f"{MISTAKE} {hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except RuntimeError:  # the first rank is gone, and its store
        return True


def _leave(store: Any, place: Place, error: UserError) -> None:
    import torch.distributed as dist

    try:
        if is_of_agent() and isinstance(error, LASTING):
            store.set(MISTAKE, f"{error.exit_code} {error}")
        met, ends = store.add("met", 1), time.monotonic() + WAIT_S
        while place.rank == 0 and not is_of_agent() and time.monotonic() < ends and met < place.world_size:
            time.sleep(0.05)
            met = store.add("met", 0)
    except RuntimeError:
        return
    have_joined = dist.is_initialized() and dist.get_world_size() > 1
    if place.rank == 0 and not is_of_agent() and met == 1 and not have_joined and not isinstance(error, MachineError):
        warn(f"no other of the {place.world_size} ranks met this at {place.where} ({place.said_by} say that there are some); {place.hint}")
