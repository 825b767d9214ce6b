"""float16 holds no number below 6e-8: the loss is multiplied, so that small gradients are not lost, and what comes out is divided again
(Micikevicius et al. 2018, arXiv:1710.03740). Where a gradient overflows, the factor is halved and the step computed again, so that no
sample and no update is lost; after many steps without, it is doubled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vlm_dist.upstream.deepspeed import scale_by_ourselves, tell_scale

if TYPE_CHECKING:
    import torch

    from vlm_dist.distributed import Ranks

FIRST, LARGEST, SMALLEST = 2.0**16, 2.0**24, 1.0
GROWS_AFTER = 2000  # steps without an overflow, as torch's GradScaler
KEPT = 100  # changes that the history remembers


class LossScale:
    """The factor, the same on all ranks at every ZeRO stage, because all of them know the norm of the gradient.

    Args:
        dtype: what is computed in; in any but float16 the factor is 1 and stays.
    """

    def __init__(self, engine: Any, dtype: torch.dtype):
        self.engine, self.is_used = engine, str(dtype) == "torch.float16"
        self.value = FIRST if self.is_used else 1.0
        self.good = self.overflows = 0
        self.history: list[list[float]] = []
        """[step, factor after it] of each change."""
        if self.is_used:
            scale_by_ourselves(engine)
            self._tell()

    def apply(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as the engine is to get it: ZeRO's optimizers multiply by themselves."""
        return loss if self.engine.zero_optimization_stage() else loss * self.value

    def overflowed(self, step: int, grad_norm: float, losses: list[torch.Tensor], ranks: Ranks) -> bool:
        """Whether the factor was too large for the gradient: then it is halved, and the same step is to be computed again. Where a loss
        itself is no number, or the factor cannot fall any further, it is not to blame. All ranks get the same answer."""
        if not self.is_used or math.isfinite(grad_norm) or self.value <= SMALLEST:
            return False
        if ranks.any(not all(bool(loss.isfinite().all()) for loss in losses)):
            return False
        self.good, self.overflows = 0, self.overflows + 1
        self._change(step, max(SMALLEST, self.value / 2))
        return True

    def fitted(self, step: int) -> None:
        """A step's gradient was finite, or its loss was not: after many without an overflow the next factor is twice as large."""
        self.good += self.is_used
        if self.good >= GROWS_AFTER:
            self.good = 0
            self._change(step, min(LARGEST, self.value * 2))

    def metrics(self) -> dict[str, float]:
        return {"loss_scale": self.value} if self.is_used else {}

    def state(self) -> dict[str, Any]:
        return {"used": self.is_used, "value": self.value, "good": self.good, "overflows": self.overflows, "history": self.history}

    def restore(self, state: dict[str, Any] | None) -> None:
        """As a checkpoint holds it; None: one of a time when there was no float16."""
        if self.is_used and state is not None and state["used"]:
            self.value, self.good, self.overflows, self.history = (state[name] for name in ("value", "good", "overflows", "history"))
            self._tell()

    def _change(self, step: int, value: float) -> None:
        if value != self.value:
            self.value = value
            self.history = [*self.history, [step, value]][-KEPT:]
            self._tell()

    def _tell(self) -> None:
        tell_scale(self.engine, self.value)
