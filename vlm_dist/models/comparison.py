"""Whether a merged model is the trained one: what held-out answers cost each, in bits a token; and whose rounding it is where they differ.

Logits that differ say little by themselves: a difference of two in a token that no one would say harms nothing, one of a tenth in every
token may. What the right answer costs (its negative log-likelihood) falls with training, and rises again where a merge loses what was
learnt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from vlm_dist.models.generate import autocast, encode_chat, generate
from vlm_dist.models.introspect import family_of
from vlm_dist.models.loss import IGNORED, summed_loss
from vlm_dist.models.merge import Onto
from vlm_dist.models.record import next_token_logits

Case = tuple[list[dict[str, Any]], list[Any]]
"""(messages that the assistant is to answer, their pictures)"""
WORSE_BITS = 0.1  # more bits a token than this is worse


@dataclass(frozen=True)
class Observed:
    """Of one model."""

    logits: list[Any]
    """[V] of the token after each case's prompt."""
    answers: list[str]
    bits: float | None
    """A token of the held-out answers, on average; None: there are none."""


@dataclass(frozen=True)
class Comparison:
    """The merged model beside the trained one (the adapter on the base in the form it was trained on)."""

    onto: Onto
    dtype: str
    samples: int
    bits_trained: float | None
    """What a token of the held-out answers costs the trained model."""
    bits_merged: float | None
    divergence_bits: float
    """Mean Kullback-Leibler divergence of the next token, trained from merged."""
    largest_logit_difference: float
    logit_spread: float
    """Standard deviation of the trained model's logits: what the difference is to be measured by."""
    same_next_token: int
    same_answer: int
    bits_float32: float | None = None
    """Of the same merge in float32, where this one is worse."""
    rounding_bits: dict[str, float] = field(default_factory=dict)
    """How many bits more rounding one part alone of that costs."""
    left_out: str = ""
    """Why they were not compared, if they were not."""

    @classmethod
    def without(cls, onto: Onto, why: str) -> Comparison:
        """Of models that could not be compared."""
        return cls(onto, "", 0, None, None, 0.0, 0.0, 0.0, 0, 0, left_out=why)

    @property
    def is_worse(self) -> bool:
        """Whether it lost what it should not."""
        if self.bits_trained is None or self.bits_merged is None:
            return self.divergence_bits > WORSE_BITS
        return not self.bits_merged - self.bits_trained <= WORSE_BITS  # nor where either is no number

    def __str__(self) -> str:
        if self.left_out:
            return f"merged onto the {self.onto} weights; not compared with the trained model: {self.left_out}"
        words = f"merged onto the {self.onto} weights in {self.dtype}"
        if self.bits_trained is not None and self.bits_merged is not None:
            words += (
                f"; a token of the held-out answers costs {self.bits_merged:.3f} bits, the trained model {self.bits_trained:.3f}"
                f" ({self.bits_merged - self.bits_trained:+.3f})"
            )
        words += (
            f"; beside the trained model on {self.samples} samples: next token {self.divergence_bits:.3g} bits away, largest logit "
            f"difference {self.largest_logit_difference:.3g} (logits spread {self.logit_spread:.3g}), same next token "
            f"{self.same_next_token} of {self.samples}, same answer {self.same_answer} of {self.samples}"
        )
        return words + self._advice()

    def _advice(self) -> str:
        if not self.is_worse:
            few = self.same_answer < self.samples and self.bits_merged is not None
            return "; answers that differ are worded otherwise, and cost no more: the merge is sound" if few else ""
        if self.bits_float32 is None:
            other = "--onto dequantised, which the adapter was trained on" if self.onto == "original" else "--dtype float32"
            return f". WORSE than what was trained; try {other}, or serve the adapter on its base"
        parts = ", ".join(f"the {part} {bits:+.3f}" for part, bits in sorted(self.rounding_bits.items(), key=lambda one: -one[1]))
        if self.bits_merged is not None and self.bits_merged - self.bits_float32 > WORSE_BITS / 2:
            cause = (
                f"rounding to {self.dtype} does it (bits a token: in float32 {self.bits_float32:.3f}; rounded alone: {parts}); export with "
                "--dtype float32"
            )
        else:
            other = "export with --onto dequantised" if self.onto == "original" else "serve the adapter on its base"
            cause = f"not rounding does it (in float32 it is {self.bits_float32:.3f} bits too), but other weights than in training; {other}"
        return f". WORSE than what was trained: {cause}"


def observe(model: Any, processor: Any, cases: list[Case], answers: list[dict[str, Any]], max_new_tokens: int) -> Observed:
    """Next-token logits and answer of each case, and what the held-out answers cost."""
    logits = next_token_logits(model, cases, processor)
    said = [generate(model, processor, encode_chat(processor, *case), max_new_tokens)[0] for case in cases]
    return Observed(logits, said, bits_a_token(model, answers))


def bits_a_token(model: Any, answers: list[dict[str, Any]]) -> float | None:
    """Negative log-likelihood of the supervised tokens, to the base 2, over their number; None: there are none.

    Args:
        answers: batches of tensors with `labels` [B, T].
    """
    import torch

    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for batch in answers:
            placed = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "weights"}
            with torch.inference_mode(), autocast(model):
                total += float(summed_loss(model, placed).sum())
            count += int((batch["labels"][:, 1:] != IGNORED).sum())
    finally:
        model.train(was_training)
    return total / count / math.log(2) if count else None


def compare(onto: Onto, dtype: str, trained: Observed, merged: Observed) -> Comparison:
    pairs = list(zip(trained.logits, merged.logits, strict=True))
    return Comparison(
        onto=onto,
        dtype=dtype,
        samples=len(pairs),
        bits_trained=trained.bits,
        bits_merged=merged.bits,
        divergence_bits=max(0.0, sum(_divergence(ours, theirs) for ours, theirs in pairs) / max(1, len(pairs))),
        largest_logit_difference=max((float((ours - theirs).abs().max()) for ours, theirs in pairs), default=0.0),
        logit_spread=max((float(ours.std()) for ours, _ in pairs), default=0.0),
        same_next_token=sum(int(ours.argmax()) == int(theirs.argmax()) for ours, theirs in pairs),
        same_answer=sum(ours == theirs for ours, theirs in zip(trained.answers, merged.answers, strict=True)),
    )


def blame(comparison: Comparison, whole: Any, answers: list[dict[str, Any]]) -> Comparison:
    """Which part's rounding costs what: each is rounded alone, and put back.

    Args:
        whole: the same merge, loaded in float32.
    """
    import torch

    bits = bits_a_token(whole, answers)
    if bits is None:
        return comparison
    family, dtype, costs = family_of(whole), getattr(torch, comparison.dtype), {}
    for side in ("vision", "projector", "language"):
        kept = {name: parameter.data for name, parameter in whole.named_parameters() if family.side_of(name) == side}
        for name, parameter in whole.named_parameters():
            if name in kept:
                parameter.data = kept[name].to(dtype).to(kept[name].dtype)
        costs[side] = round((bits_a_token(whole, answers) or 0.0) - bits, 6)
        for name, parameter in whole.named_parameters():
            if name in kept:
                parameter.data = kept[name]
    return replace(comparison, bits_float32=bits, rounding_bits=costs)


def _divergence(ours: Any, theirs: Any) -> float:
    import torch

    first, second = ours.double().log_softmax(0), theirs.double().log_softmax(0)
    return float(torch.nn.functional.kl_div(second, first, reduction="sum", log_target=True)) / math.log(2)
