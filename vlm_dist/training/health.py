"""Stopping when asked, and when going on would make no sense."""

from __future__ import annotations

import math
import signal
import threading
from types import FrameType, TracebackType

from vlm_dist.errors import UserError


class DivergedError(UserError):
    """The loss is no number any more."""

    exit_code = 7


class StopRequest:
    """Within this context SIGINT (Ctrl-C) and SIGTERM ask for a stop after the current step; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        main = threading.current_thread() is threading.main_thread()  # elsewhere Python takes no handlers
        for number in (signal.SIGINT, signal.SIGTERM) if main else ():
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def check_finite(loss: float, step: int) -> None:
    """Raises:
    DivergedError: the loss is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise DivergedError(
            f"training: the loss of step {step} is {loss}; nothing after the last checkpoint is kept. "
            "Use a smaller optim.lr or a longer optim.warmup_steps, then run again under another name"
        )
