"""How the ranks of one start find one another: by a store on the first of them, in which each says that it is there.

torch's own way waits in silence for as many connections as there are ranks, whoever they are. Here the first rank says who is missing,
and a rank that has come to another run's store leaves before it is counted.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from vlm_dist import networks
from vlm_dist.errors import MachineError, UserError, warn
from vlm_dist.launched import Place, start_id

TELL_S = 10.0
LISTEN_S = 1.0  # torch's wait hears no Ctrl-C
MISTAKE, STRANGER = "mistake", "stranger"
MACHINE, AFAR = "machine", "afar"  # that of the first rank; the address of a rank on another one
NAMED = 16  # ranks named in one line


_connected: list[Any] = []


def join(place: Place, run: str, timeout_s: float) -> Any:
    """A store for `torch.distributed.init_process_group` in which every rank has said that it is there.

    Args:
        run: what all ranks must have in common: the run's directory.
        timeout_s: until all must be there.

    Raises:
        MachineError: they are not; the first one left; the port is taken; or the store is another run's.
        UserError: torchrun has started the ranks again, after a mistake that a new start does not mend.
    """
    import torch.distributed as dist

    if place.world_size == 1:
        return dist.HashStore()
    ends = time.monotonic() + timeout_s
    with telling(place, TELL_S):
        base = connected(place, timeout_s)
        _refuse_again(base)
        _compare(base, place, f"{run}\n{start_id()}", ends, timeout_s)
        number = _start(base, place, ends, timeout_s)
        store = dist.PrefixStore(f"vlm_dist/{number}", base)
        if store.add(f"rank {place.rank}", 1) > 1:
            raise MachineError(
                f"rank {place.rank} of {place.world_size} is there twice at {place.where} ({place.said_by}); this one leaves"
            )
    if base.get(MACHINE).decode() != networks.machine():
        store.set(AFAR, networks.address_towards(place.host))
    store.add("there", 1)
    if place.rank == 0:
        _gather_all(store, _listening(base, number, place), place, ends, timeout_s)
    elif word := _word(store, "all", place, ends + TELL_S, timeout_s):  # the first rank has given up, and tells why
        error = MachineError(word)
        error.told = True
        raise error
    if store.check([AFAR]) and (told := networks.choose(place.host, store.get(AFAR).decode())) and place.local_rank == 0:
        warn(told)
    return dist.PrefixStore("group", store)


def connected(place: Place, timeout_s: float) -> Any:
    """The store of all ranks of a launcher's start, connected once; nothing is known yet of who else is there.

    Raises:
        MachineError: the port is taken, or nobody listens there.
    """
    import torch.distributed as dist

    if _connected:
        return _connected[0]
    keeps = place.rank == 0 and not is_of_agent()
    if not keeps:
        _await_first(place, timeout_s)
    seconds = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(place.host, place.port, place.world_size, keeps, seconds, wait_for_workers=False)
    except dist.DistError as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error):
            raise _nobody(place, timeout_s, str(error)) from None
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
    """Until something listens there: torch's own search says nothing."""
    ends = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > ends:
                raise _nobody(place, timeout_s, error.strerror or str(error)) from None
            time.sleep(0.2)


def _compare(base: Any, place: Place, whose: str, ends: float, timeout_s: float) -> None:
    """The first rank says whose store it is, the others look.

    Raises:
        MachineError: it is another run's.
    """
    if place.rank == 0:
        base.set(MACHINE, networks.machine())
        base.set("whose", whose)
        return
    found = _word(base, "whose", place, ends, timeout_s)
    if found != whose:
        theirs, ours = (text.partition("\n")[0] for text in (found, whose))
        what = f"the run {theirs}" if theirs != ours else "another start of this run"
        if is_of_agent():  # torchrun has mixed two starts into one, in which this rank will be missing
            base.set(STRANGER, f"rank {place.rank} trains {ours}")
        raise MachineError(
            f"rank {place.rank} of {place.world_size} has come to {place.where}, where {what} meets; it leaves without harm. "
            "Two starts share that port: give this one another (deepspeed --master_port, torchrun --master-port or --rdzv-endpoint)"
        )


def _start(base: Any, place: Place, ends: float, timeout_s: float) -> str:
    """Which of the starts in this store this is. torchrun's store outlives them, and its agents count restarts each for itself, so the
    first rank counts; each other one says that it has come, and is answered by the first rank of its own start alone."""
    if not is_of_agent():
        return "0"
    if place.rank == 0:
        return str(base.add("starts", 1))
    return _word(base, f"answer {base.add('arrivals', 1)}", place, ends, timeout_s)


def _listening(base: Any, number: str, place: Place) -> Callable[[], None]:
    """A function that tells whoever has come to torchrun's store which start this is, also those of earlier starts, who are gone. It raises
    a MachineError where one belongs to another start."""
    answered = 0

    def listen() -> None:
        nonlocal answered
        if base.check([STRANGER]):
            raise MachineError(
                f"{base.get(STRANGER).decode()}, and torchrun counts it to this start at {place.where}, which does not: give the same "
                f"command on every node, and another --rdzv-endpoint or --rdzv-id than '{start_id()}' to another start"
            )
        while answered < base.add("arrivals", 0):
            answered += 1
            base.set(f"answer {answered}", number)

    return listen


def _gather_all(store: Any, listen: Callable[[], None], place: Place, ends: float, timeout_s: float) -> None:
    """The first rank looks for the others, tells who is missing, and gives the word when all are there."""
    told = time.monotonic()
    try:
        while store.add("there", 0) < place.world_size:
            listen()
            now = time.monotonic()
            if now > ends or now - told > TELL_S:
                missing = [rank for rank in range(place.world_size) if not store.check([f"rank {rank}"])]
                if now > ends:
                    raise _missing(place, missing, timeout_s, "")
                told = now
                warn(f"waiting at {place.where} for {_named(missing)} of {place.world_size} ({place.said_by} say so); {place.hint}")
            time.sleep(0.05)
    except MachineError as error:
        store.set("all", str(error))
        raise
    store.set("all", "")


def _word(store: Any, key: str, place: Place, ends: float, timeout_s: float) -> str:
    """What the first rank writes there under this key.

    Raises:
        MachineError: it did not until then, or is gone with the store.
    """
    import torch.distributed as dist

    ends = max(ends, time.monotonic() + LISTEN_S)
    while True:
        try:
            store.wait([key], timedelta(seconds=LISTEN_S))
            return store.get(key).decode()
        except dist.DistStoreError:  # not yet
            if time.monotonic() >= ends:
                raise _missing(place, [0], timeout_s, "") from None
        except dist.DistNetworkError:
            raise _left(place) from None


def _left(place: Place) -> MachineError:
    who = "torchrun on the first node" if is_of_agent() else "rank 0"
    return MachineError(
        f"{who} has left {place.where} before all {place.world_size} ranks had come; its own output says why. "
        f"This is rank {place.rank}, as {place.said_by} say; {place.hint}"
    )


def _missing(place: Place, ranks: list[int], timeout_s: float, why: str) -> MachineError:
    why = f" ({why.splitlines()[0][:160]})" if why else ""
    return MachineError(
        f"{_named(ranks)} of {place.world_size} did not come to {place.where} in {timeout_s:g} s (distributed.join_timeout_s){why}; "
        f"this is rank {place.rank}, as {place.said_by} say; {place.hint}"
    )


def _nobody(place: Place, timeout_s: float, why: str) -> MachineError:
    """There is no store, and so nobody to agree with on who tells it."""
    error = _missing(place, [0], timeout_s, why)
    error.of_one = True
    return error


@contextmanager
def telling(place: Place, first_s: float) -> Iterator[None]:
    """What another rank waits for while it looks for the first one: after so many seconds, and then every ten."""
    done = threading.Event()

    def tell() -> None:
        pause = first_s
        while not done.wait(pause):
            pause = TELL_S
            warn(f"rank {place.rank} of {place.world_size} waits for rank 0 at {place.where} ({place.said_by} say so); {place.hint}")

    threading.Thread(target=tell, name="joining", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:NAMED]))}{more}"
