"""float16 holds no number below 6e-8: the loss is multiplied, so that small gradients are not lost, and what comes out is divided again
(Micikevicius et al. 2018, arXiv:1710.03740). The factor is halved when a gradient overflows, and doubled after many steps without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from vlm_dist.upstream.deepspeed import scale_by_ourselves, tell_scale

if TYPE_CHECKING:
    import torch

FIRST, LARGEST, SMALLEST = 2.0**16, 2.0**24, 1.0
GROWS_AFTER = 2000  # steps without an overflow, as torch's GradScaler
KEPT = 100  # changes that the history remembers

Verdict = Literal["good", "skipped", "spike", "overflow"]


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

    @property
    def can_fall(self) -> bool:
        """Whether an infinite gradient may be its doing."""
        return self.value > SMALLEST

    def apply(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as the engine is to get it: ZeRO's optimizers multiply by themselves."""
        return loss if self.engine.zero_optimization_stage() else loss * self.value

    def after(self, step: int, verdict: Verdict) -> None:
        """Set the factor for the next step."""
        if not self.is_used or verdict == "skipped":  # the loss itself was no number: no factor is to blame
            return
        self.good = 0 if verdict == "overflow" else self.good + 1
        self.overflows += verdict == "overflow"
        if verdict == "overflow":
            self._change(step, max(SMALLEST, self.value / 2))
        elif self.good >= GROWS_AFTER:
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
