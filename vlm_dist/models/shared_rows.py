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
    heads = hf_config.get_text_config().num_attention_heads
    if heads % number:
        raise ConfigError(
            f"engine.sequence_parallel={number}: does not divide the {heads} attention heads of this '{family.model_type}'; "
            f"use {', '.join(str(one) for one in range(1, heads + 1) if heads % one == 0)}"
        )


def cutting(model: Any) -> AbstractContextManager[None]:
    """Around forward and backward passes of training: rows are cut, if the model is one whose rows are."""
    cut = getattr(model, "sequence_cut", None)
    return nullcontext() if cut is None else cut.cutting()
