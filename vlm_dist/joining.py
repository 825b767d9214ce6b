"""How the ranks of one start find one another: by a store on the first of them, in which each says that it is there.

torch's own way waits in silence for as many connections as there are ranks, whoever they are. Here the first rank says who is missing,
and a rank that has come to another run's store leaves before it is counted.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from vlm_dist.errors import MachineError, UserError, warn
from vlm_dist.launched import Place, start_id

TELL_S = 10.0
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
MISTAKE = "mistake"
_connected: list[Any] = []
NAMED = 16  # ranks named in one line


def join(place: Place, run: str, timeout_s: float) -> Any:
    """A store for `torch.distributed.init_process_group` in which every rank has said that it is there.

    Args:
        run: what all ranks must have in common: the run's directory.
        timeout_s: until all must be there.

    Raises:
        MachineError: they are not; the port is taken; or the store is another run's.
        UserError: torchrun has started the ranks again, after a mistake that a new start does not mend.
    """
    import torch.distributed as dist

    if place.world_size == 1:
        return dist.HashStore()
    ends = time.monotonic() + timeout_s
    whose = f"{run}\n{start_id()}"
    with _telling(place):
        base = connected(place, timeout_s)
        _refuse_again(base)
        store = dist.PrefixStore(f"vlm_dist/{os.environ.get(RESTARTS, '0')}", base)
        if place.rank == 0:
            store.set("whose", whose)
        else:
            _compare(store, place, whose, timeout_s)
        if store.add(f"rank {place.rank}", 1) > 1:
            raise MachineError(
                f"rank {place.rank} of {place.world_size} is there twice at {place.where} ({place.said_by}); this one leaves"
            )
    _wait_for_all(store, place, ends, timeout_s)
    return dist.PrefixStore("group", store)


def connected(place: Place, timeout_s: float) -> Any:
    """The store of all ranks of a launcher's start, connected once; nothing is known yet of who else is there.

    Raises:
        MachineError: the port is taken, or nobody listens there.
    """
    import torch.distributed as dist

    if _connected:
        return _connected[0]
    if place.rank > 0:
        _await_first(place, timeout_s)
    seconds = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(
            place.host, place.port, place.world_size, place.rank == 0 and not is_of_agent(), seconds, wait_for_workers=False
        )
    except dist.DistError as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error):
            raise _missing(place, [0], timeout_s, str(error)) from None
        raise MachineError(
            f"port {place.port} (MASTER_PORT) of this machine is in use, by another run or program; give this start another one "
            f"(deepspeed --master_port, torchrun --master-port; `vlm-dist launch` finds a free one)"
        ) from None
    _connected.append(store)
    return store


def is_of_agent() -> bool:
    """Whether torchrun itself keeps the store: it outlives the ranks, and starts them again."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _refuse_again(store: Any) -> None:
    """Raises:
    UserError: an earlier start of these ranks has told a mistake that a new start does not mend.
    """
    if not store.check([MISTAKE]):
        return
    code, _, text = store.get(MISTAKE).decode().partition(" ")
    error = UserError(text)
    error.exit_code, error.told = int(code), True
    raise error


def _await_first(place: Place, timeout_s: float) -> None:
    """Until something listens there: torch's own search ends with pages of C++."""
    ends = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > ends:
                raise _missing(place, [0], timeout_s, error.strerror or str(error)) from None
            time.sleep(0.2)


def _compare(store: Any, place: Place, whose: str, timeout_s: float) -> None:
    import torch.distributed as dist

    try:
        store.wait(["whose"], timedelta(seconds=timeout_s))
        found = store.get("whose").decode()
    except dist.DistError as error:
        raise _missing(place, [0], timeout_s, str(error)) from None
    if found != whose:
        run = found.partition("\n")[0]
        what = f"the run {run}" if run != whose.partition("\n")[0] else "another start of this run"
        raise MachineError(
            f"rank {place.rank} of {place.world_size} has come to {place.where}, where {what} meets; it leaves without harm. "
            "Two starts share that port: give this one another (deepspeed --master_port, torchrun --master-port)"
        )


def _wait_for_all(store: Any, place: Place, ends: float, timeout_s: float) -> None:
    """The first rank looks for the others, and tells who is missing; they wait for its word."""
    import torch.distributed as dist

    store.add("there", 1)
    if place.rank > 0:
        try:
            store.wait(["all"], timedelta(seconds=max(1.0, ends - time.monotonic()) + TELL_S))
        except dist.DistError as error:
            raise _missing(place, [0], timeout_s, str(error)) from None
        return
    told = time.monotonic()
    while store.add("there", 0) < place.world_size:
        now = time.monotonic()
        if now > ends or now - told > TELL_S:
            missing = [rank for rank in range(place.world_size) if not store.check([f"rank {rank}"])]
            if now > ends:
                raise _missing(place, missing, timeout_s, "")
            told = now
            warn(f"waiting at {place.where} for {_named(missing)} of {place.world_size} ({place.said_by} say so); {place.hint}")
        time.sleep(0.05)
    store.set("all", "")


def _missing(place: Place, ranks: list[int], timeout_s: float, why: str) -> MachineError:
    why = f" ({why.splitlines()[0][:160]})" if why else ""
    return MachineError(
        f"{_named(ranks)} of {place.world_size} did not come to {place.where} in {timeout_s:g} s (distributed.join_timeout_s){why}; "
        f"this is rank {place.rank}, as {place.said_by} say. {place.hint}"
    )


@contextmanager
def _telling(place: Place) -> Iterator[None]:
    """What another rank waits for while torch looks for the first one."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(TELL_S):
            warn(f"rank {place.rank} of {place.world_size} waits for rank 0 at {place.where} ({place.said_by} say so); {place.hint}")

    threading.Thread(target=tell, name="joining", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:NAMED]))}{more}"
