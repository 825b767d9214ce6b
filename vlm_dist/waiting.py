"""What a command is waiting for, told where the wait is longer than two seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vlm_dist.errors import MachineError
from vlm_dist.launched import announced

FIRST_S, NEXT_S = 2.0, 30.0
_stack: list[str] = []


def _is_first() -> bool:
    """Whether this rank speaks; where the launcher's variables do not agree, the start itself says so."""
    try:
        return announced().rank == 0
    except MachineError:
        return True


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Around something that may take long: after two seconds a line on standard error says what it is, and every half minute again with
    the time; at the end how long it took, if it was told. Inside another wait the inner one speaks."""
    ended, is_first = threading.Event(), _is_first()
    begin = time.monotonic()
    told = False

    def tell() -> None:
        nonlocal told
        pause = FIRST_S
        while not ended.wait(pause):
            if is_first and _stack and _stack[-1] is what:
                seconds = time.monotonic() - begin
                print(f"{what} ..." if not told else f"{what} ... {seconds:.0f} s", file=sys.stderr, flush=True)
                told = True
            pause = NEXT_S

    _stack.append(what)
    thread = threading.Thread(target=tell, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _stack.remove(what)
        if told:
            print(f"{what}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
