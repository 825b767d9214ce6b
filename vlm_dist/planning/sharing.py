"""Rows that no card can hold alone: the least number of cards that can share one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm_dist.errors import ConfigError
from vlm_dist.models.shared_rows import check_sequence
from vlm_dist.planning.plan import Planner, make_plan


def plan_shared(planner: Planner, plan: dict[str, Any]) -> dict[str, Any]:
    """Where nothing of `plan` fits, the plan with the least engine.sequence_parallel of these GPUs with which something does; else `plan`.

    Args:
        plan: what `make_plan` gave, its choices included.
    """
    if _any_fits(plan):
        return plan
    for number in numbers(planner):
        planner.note(f"nothing fits; a row shared by {number} GPUs (engine.sequence_parallel)")
        engine = planner.config.engine.model_copy(update={"sequence_parallel": number})
        found = make_plan(replace(planner, config=planner.config.model_copy(update={"engine": engine}), _counted={}))
        if _any_fits(found):
            return found
    return plan


def numbers(planner: Planner) -> list[int]:
    """How many of these GPUs could share a row, beyond the configuration's own: divisors of their number and of the attention heads."""
    own, found = planner.config.engine.sequence_parallel, []
    for number in range(own + 1, planner.gpus + 1):
        if planner.gpus % number == 0 and number % own == 0:
            try:
                check_sequence(planner.inputs.family, planner.inputs.hf_config, number)
            except ConfigError:
                continue
            found.append(number)
    return found


def _any_fits(plan: dict[str, Any]) -> bool:
    return any(choice["fits"] for choice in plan["choices"])
