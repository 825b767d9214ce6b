"""Whether rows of a model can be cut over ranks, and when they are; the cut itself is sequence.py. A leaf: no torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vlm_dist.errors import ConfigError
from vlm_dist.families import Family


def check_sequence(family: Family, hf_config: Any, number: int) -> None:
    """Whether rows of this model can be cut over so many ranks.

    Raises:
        ConfigError: they cannot.
    """
    if number == 1:
        return
    if not family.cuts:
        raise ConfigError(
            f"engine.sequence_parallel={number}: rows of '{family.model_type}' cannot be cut over ranks (docs/scaling.md lists what can); "
            "set it to 1"
        )
    if number not in (can := shareable(family, hf_config)):
        raise ConfigError(
            f"engine.sequence_parallel={number}: does not divide the {can[-1]} attention heads of this '{family.model_type}'; "
            f"use {', '.join(map(str, can))}"
        )


def shareable(family: Family, hf_config: Any) -> list[int]:
    """How many ranks can share a row of this model: the divisors of its attention heads; 1 alone where rows cannot be cut."""
    heads = hf_config.get_text_config().num_attention_heads if family.cuts else 1
    return [number for number in range(1, heads + 1) if heads % number == 0]


def cutting(model: Any) -> AbstractContextManager[None]:
    """Around forward and backward passes of training: rows are cut, if the model is one whose rows are."""
    cut = getattr(model, "sequence_cut", None)
    return nullcontext() if cut is None else cut.cutting()
