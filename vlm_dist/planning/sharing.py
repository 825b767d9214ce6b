"""Rows that no card can hold alone: the least number of cards that can share one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vlm_dist.config import Config
from vlm_dist.deepspeed_config import check_batches
from vlm_dist.errors import ConfigError
from vlm_dist.inputs.opened import Inputs, inputs_apart
from vlm_dist.models.shared_rows import check_sequence
from vlm_dist.planning.gpus import Gpu
from vlm_dist.planning.plan import Planner, make_plan, new_planner


@contextmanager
def open_sharing_planner(config: Config, gpu: Gpu, gpus: int, **options: Any) -> Iterator[Planner]:
    """As `open_planner`; where the global batch has too few rows for so many GPUs, the least engine.sequence_parallel with which it has
    enough is taken."""
    with inputs_apart(config) as inputs:
        yield new_planner(_enough_rows(inputs, gpus), gpu, gpus, **options)


def plan_shared(planner: Planner, plan: dict[str, Any]) -> dict[str, Any]:
    """Where nothing of `plan` fits, the plan with the least engine.sequence_parallel of these GPUs with which something does, or that with
    most of them; else `plan`.

    Args:
        plan: what `make_plan` gave, its choices included.
    """
    for number in numbers(planner.inputs, planner.config, planner.gpus):
        if any(choice["fits"] for choice in plan["choices"]):
            break
        planner.note(f"nothing fits; a row shared by {number} GPUs (engine.sequence_parallel)")
        plan = make_plan(replace(planner, config=_with(planner.config, number), _counted={}))
    return plan


def numbers(inputs: Inputs, config: Config, gpus: int) -> list[int]:
    """How many of these GPUs could share a row, beyond the configuration's own: divisors of their number and of the attention heads."""
    own, found = config.engine.sequence_parallel, []
    for number in range(own + 1, gpus + 1):
        if gpus % number == 0:
            try:
                check_sequence(inputs.family, inputs.hf_config, number)
                check_batches(_with(config, number), gpus)
            except ConfigError:
                continue
            found.append(number)
    return found


def _enough_rows(inputs: Inputs, gpus: int) -> Inputs:
    try:
        check_batches(inputs.config, gpus)
    except ConfigError:
        found = numbers(inputs, inputs.config, gpus)
        if not found:
            raise
        return replace(inputs, config=_with(inputs.config, found[0]))
    return inputs


def _with(config: Config, number: int) -> Config:
    return config.model_copy(update={"engine": config.engine.model_copy(update={"sequence_parallel": number})})
