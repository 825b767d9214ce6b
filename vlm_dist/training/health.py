"""Stopping when asked; leaving out a step that is no number; finding loss spikes and slow ranks."""

from __future__ import annotations

import math
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal

from vlm_dist.config import Config, HealthConfig
from vlm_dist.distributed import Ranks
from vlm_dist.errors import MachineError, UserError
from vlm_dist.training.log import Log

if TYPE_CHECKING:
    import torch

ASKS_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
WINDOW = 64  # losses that a spike is measured against
SMALLEST_WINDOW = 16
SLOW_STEPS = 20  # steps over which a rank must be slow
SILENCE = 500  # steps until a slow rank is named again
NAMED = 20  # samples named in one line


class DivergedError(UserError):
    """The loss is no number any more, or jumps again and again."""

    exit_code = 7


class StopRequest:
    """Within this context SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP (the terminal was closed) ask for a stop after the current step; a
    second SIGINT ends at once. Under nohup SIGHUP stays without effect.

    Args:
        elsewhere: another way to be asked, looked at each time: the number of a signal, or None.
    """

    def __init__(self, elsewhere: Callable[[], int | None] | None = None) -> None:
        self.signal: int | None = None
        self._elsewhere = elsewhere
        self._asked = 0.0
        self._terminals: list[int] = []
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        if self.signal is None and self._elsewhere is not None and (number := self._elsewhere()) is not None:
            self._note(number)
        return self.signal is not None

    @property
    def seconds(self) -> float | None:
        """Since this process was asked; None: it was not."""
        return None if self.signal is None else time.monotonic() - self._asked

    def __enter__(self) -> StopRequest:
        self._terminals = [number for number in (1, 2) if _is_terminal(number)]
        main = threading.current_thread() is threading.main_thread()  # elsewhere Python takes no handlers
        for number in ASKS_TO_STOP if main else ():
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminal()
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._note(number)

    def _note(self, number: int) -> None:
        self.signal, self._asked = number, time.monotonic() if self.signal is None else self._asked

    def _leave_terminal(self) -> None:
        """Where it is gone, every word to it would be an error, and end the run before it has saved."""
        for number in self._terminals:
            if not _is_terminal(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


def _is_terminal(number: int) -> bool:
    """Whether a file descriptor is of a terminal that is there."""
    try:
        return os.isatty(number)
    except OSError:
        return False


def poisoned_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss; one that is not finite gets gradients that are not finite either, so that the gradient norm, which all ranks know,
    decides whether the update is made. Costs no wait for the device."""
    import torch

    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))


def out_of_memory(config: Config, error: Exception, kept: str) -> MachineError:
    """What to change, cheapest first.

    Args:
        kept: what is left to go on from, in words.
    """
    training, model = config.training, config.model
    ways = [
        f"training.micro_batch={training.micro_batch // 2}" if training.micro_batch > 1 else "",
        "" if model.gradient_checkpointing else "model.gradient_checkpointing=true",
        "" if config.kernels in ("auto", "all") else "kernels=auto",
        "" if model.load_in_4bit or config.lora is None else "model.load_in_4bit=true",
        "smaller pictures (model.processor, e.g. max_pixels) or a smaller data.max_seq_length",
        "" if config.engine.zero_stage == 3 else "engine.zero_stage=3 on several GPUs",
    ]
    return MachineError(
        f"training: out of memory ({str(error).splitlines()[0][:160]}). Try, in this order: {'; '.join(way for way in ways if way)}. "
        f"What is kept: {kept}"
    )


class Health:
    """Judges each step. All ranks get the same numbers and so come to the same verdict.

    Args:
        kept: says what is left to go on from.
    """

    def __init__(self, config: HealthConfig, log: Log, ranks: Ranks, kept: Callable[[], str] = lambda: "no checkpoint was saved yet"):
        self.kept = kept
        self.config, self.log, self.ranks = config, log, ranks
        self.skipped = self.rollbacks = 0
        self._skipped_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._busy: deque[list[float]] = deque(maxlen=SLOW_STEPS)
        self._named: dict[int, int] = {}

    def judge(
        self, step: int, loss: float, grad_norm: float, keys: list[list[str]], losses: list[torch.Tensor]
    ) -> Literal["good", "skipped", "spike"]:
        """What to make of a step.

        Args:
            loss: mean over the step, on all ranks.
            grad_norm: not finite: the update was not made.
            keys: the samples of each of this rank's micro-batches.
            losses: the summed loss of each.

        Raises:
            DivergedError: too many steps in a row had to be left out.
        """
        if not math.isfinite(grad_norm) or not math.isfinite(loss):
            self._skip(step, loss, keys, losses)
            return "skipped"
        self._skipped_in_a_row = 0
        limit = self._limit()
        self._losses.append(loss)  # a spike too: where the loss stays high, the median follows
        if limit is not None and loss > limit:
            self.log.event("spike", step, f"the loss {loss:.4g} is far above the last ones (limit {limit:.4g})", loss=loss)
            return "spike"
        return "good"

    def count_rollback(self, step: int) -> None:
        """Raises:
        DivergedError: there were too many.
        """
        if self.rollbacks == self.config.max_rollbacks:
            raise DivergedError(
                f"training: the loss jumped again at step {step}, after {self.config.max_rollbacks} rollbacks; "
                "use a smaller optim.lr, or look at the samples named in events.jsonl"
            )
        self.rollbacks += 1

    def watch_speed(self, step: int, busy_s: list[float]) -> None:
        """Name a rank that is much slower than the others; `busy_s`: seconds that each rank worked in this step."""
        self._busy.append(busy_s)
        if len(busy_s) == 1 or len(self._busy) < SLOW_STEPS:
            return
        means = [statistics.fmean(rank) for rank in zip(*self._busy, strict=True)]
        slowest = max(range(len(means)), key=means.__getitem__)
        others = statistics.median(means[:slowest] + means[slowest + 1 :])
        if means[slowest] > self.config.slow_factor * others and step - self._named.get(slowest, -SILENCE) >= SILENCE:
            self._named[slowest] = step
            self.log.event(
                "slow rank", step, f"rank {slowest} took {means[slowest]:.3f} s a step, the others {others:.3f} s: all wait for it",
                rank=slowest, busy_s=round(means[slowest], 4), others_s=round(others, 4),
            )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What an exact continuation needs."""
        return {"skipped": self.skipped, "rollbacks": self.rollbacks, "losses": list(self._losses)}

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped, self.rollbacks = state["skipped"], state["rollbacks"]
        self._losses.extend(state["losses"])

    def _limit(self) -> float | None:
        """Median + factor x spread of the last losses; the spread is the median absolute deviation, scaled to a standard deviation, and
        at least 5 % of the median."""
        if self.config.spike_factor is None or len(self._losses) < SMALLEST_WINDOW:
            return None
        middle = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(loss - middle) for loss in self._losses)
        return middle + self.config.spike_factor * max(spread, 0.05 * abs(middle))

    def _skip(self, step: int, loss: float, keys: list[list[str]], losses: list[torch.Tensor]) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        finite = [math.isfinite(float(part)) for part in losses]
        parts = [part for rank in self.ranks.gather(list(zip(keys, finite, strict=True))) for part in rank]
        bad = [key for names, good in parts if not good for key in names]
        what = f"the loss is {loss}" if bad else "the gradient is not finite"
        named = bad or [key for names, _ in parts for key in names]
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        self.log.event("skipped", step, f"{what}; no update. Samples: {', '.join(named[:NAMED])}{more}", samples=named[:NAMED])
        if self._skipped_in_a_row > self.config.max_skipped:
            raise DivergedError(
                f"training: step {step} is the {self._skipped_in_a_row}. in a row whose loss or gradient is no finite number "
                f"(health.max_skipped={self.config.max_skipped}); {self.kept()}. "
                "Use a smaller optim.lr or a longer optim.warmup_steps, then run again under another name"
            )
