"""What the first step of every start proves: all that should train got a gradient, and how much of what was read is learnt from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_dist.data.stream import Counts

if TYPE_CHECKING:
    from vlm_dist.families import Family
    from vlm_dist.training.log import Log

NAMED = 3  # modules that a warning names


class FirstStep:
    """Watches the backward passes of one step. Silently starved adapters (a reentrant checkpoint around a frozen input, a module that
    the forward pass goes around) otherwise show only in the result."""

    def __init__(self, model: Any, family: Family):
        self.family = family
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._without = set(trainable)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._without.discard(name))
            for name, parameter in trainable.items()
        ]

    def tell(self, step: int, counts: Counts, log: Log) -> None:
        """After the first step: one line when all is well, a warning with names when not. Later calls do nothing."""
        if not self._hooks:
            return
        total = len(self._hooks)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if not counts.labels:
            log.say("first step: nothing is learnt from it: none of its samples can be used")
            return
        share = counts.labels / max(1, counts.tokens)
        if not self._without:
            log.say(f"first step: all {total} trainable tensors have a gradient; {share:.1%} of {counts.tokens:,} tokens are supervised")
            return
        names = sorted(name.removeprefix("base_model.model.") for name in self._without)
        sides = sorted({self.family.side_of(name) for name in names})
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        log.event(
            "no gradient", step,
            f"{len(names)} of {total} trainable tensors got none in the first step ({', '.join(sides)}): {', '.join(names[:NAMED])}{more}; "
            "they will not learn", names=names,
        )  # fmt: skip
