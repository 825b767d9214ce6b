"""Whether a run fits the card that it starts on, told before any weight is loaded."""

from __future__ import annotations

import logging
from typing import Any

from vlm_dist.distributed import Ranks
from vlm_dist.errors import MachineError, UserError
from vlm_dist.inputs.opened import Inputs
from vlm_dist.planning.gpus import Gpu
from vlm_dist.planning.plan import make_plan, new_planner, without_experts

UNSURE = 0.1  # a plan that is over by less is tried
logger = logging.getLogger(__name__)


def check_fits(inputs: Inputs, ranks: Ranks, gpu: Gpu | None = None) -> None:
    """Before anything is loaded: refuse what the card of this rank cannot hold, as `health.on_too_large` says. Nothing on a CPU.

    Where lora.experts is left open and only adapters on experts are too much, `inputs.config` is without them from then on.

    Raises:
        MachineError: a step would need more memory than the card has.
    """
    import torch

    config = inputs.config
    if config.health.on_too_large == "ignore" or config.model.name is None or (gpu is None and ranks.device.type != "cuda"):
        return  # a model that is yet to be made is only rehearsed
    problem, why = None, ""
    if ranks.is_first:
        card = gpu or Gpu(torch.cuda.get_device_name(ranks.device), torch.cuda.mem_get_info(ranks.device)[1], 1.0, 1.0, 1.0)
        try:
            plan = make_plan(new_planner(inputs, card, ranks.world_size), others=False)
        except UserError as error:
            logger.warning("%s", error)  # what cannot be counted may train all the same; what is wrong is told where it is used
        else:
            own, why = plan["own"], plan["experts"]["why"]
            most = max(own["total"], own["loading"])
            if most > card.memory:
                problem = _too_large(own, card), most > (1 + UNSURE) * card.memory
    problem, why = ranks.gather((problem, why))[0]
    if why:
        inputs.config = without_experts(config)
        if ranks.is_first:
            logger.warning("%s; lora.experts=lora insists", why)
    if problem is None:
        return
    words, surely = problem
    if surely and config.health.on_too_large == "refuse":
        raise MachineError(f"{words}; or insist with health.on_too_large=tell")
    if ranks.is_first:
        logger.warning("%s; trying it all the same", words)


def _too_large(own: dict[str, Any], card: Gpu) -> str:
    largest = sorted(own["memory"].items(), key=lambda part: -part[1])[:4]
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest)
    needed = f"loading needs {own['loading'] / 1e9:.1f} GB, a step about {own['total'] / 1e9:.1f} GB"
    has = f"{card.name} has {card.memory / 1e9:.1f} ({parts})"
    return f"training.micro_batch={own['micro_batch']}: {needed}, {has}; `vlm-dist plan CONFIG --auto` finds settings that fit"
