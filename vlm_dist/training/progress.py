"""How far a run is, and how far it goes."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_dist.config import Config
from vlm_dist.data.stream import Counts, Stream
from vlm_dist.distributed import Ranks


@dataclass(frozen=True)
class Progress:
    """Totals over all ranks since the run began, over every start of it."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    label_tokens: float = 0
    """Each as much as its turn's weight."""
    wall_s: float = 0.0
    productive_s: float = 0.0
    """Seconds of the steps that count: not of those left out, rolled back or lost in a crash."""
    data_step: int = 0
    """Steps of data used; more than `step` after a rollback."""
    updates: int = 0
    """Updates of the optimizer; fewer than `step` where steps were left out."""

    def after(self, counts: Counts, wall_s: float, step_s: float, *, skipped: bool) -> Progress:
        """The totals after one more step."""
        return Progress(
            step=self.step + 1,
            samples=self.samples + counts.samples,
            tokens=self.tokens + counts.tokens,
            label_tokens=self.label_tokens + counts.labels,
            wall_s=round(wall_s, 3),
            productive_s=round(self.productive_s + step_s * (not skipped), 3),
            data_step=self.data_step + 1,
            updates=self.updates + (not skipped),
        )


def count_steps(config: Config, stream: Stream, ranks: Ranks) -> int:
    """Optimizer steps of the whole run; with packing and training.epochs all samples are measured to tell."""
    if config.training.steps is not None:
        return config.training.steps
    told = 0

    def note(share: float) -> None:
        nonlocal told
        if ranks.is_first and share >= (told + 1) / 10:
            told = int(10 * share)
            print(f"data: {share:.0%} of the samples measured", flush=True)

    if config.data.packing and ranks.is_first:
        print(f"data: measuring every sample, to tell how many steps {config.training.epochs:g} epochs take", flush=True)
    return max(ranks.gather(stream.count_steps(note)))


def is_due(every: int, step: int) -> bool:
    """Whether what comes every so many steps comes after this one; 0: never."""
    return every > 0 and step % every == 0


def interrupted_in_words(step: int, seconds: float | None, grace_s: float) -> str:
    """After which step a run was interrupted, and what is left.

    Args:
        seconds: since the signal; None: another rank got it.
    """
    if step == 0:
        return "before the first step; there is nothing to save yet. Run the same command again to begin"
    late = f", {seconds:.0f} s after it, later than checkpoint.grace_s={grace_s:g}" if seconds is not None and seconds > grace_s else ""
    return f"after step {step}; saved{late}. Run the same command again to continue"
