"""Gradient checkpointing by side and number of layers."""

from __future__ import annotations

from typing import Any

from vlm_dist.errors import ModelError
from vlm_dist.families import Family
from vlm_dist.models.offloading import offload_inputs


def checkpoint_gradients(model: Any, family: Family, wanted: bool | str | dict[Any, bool | int]) -> None:
    """Let layers keep only their input and recompute the rest in the backward pass (Chen et al. 2016, arXiv:1604.06174).

    Args:
        wanted: whether; "offload": in all layers, whose inputs are kept in host memory (models/offloading.py); or by side, whether, or in
            how many of its first layers.

    Raises:
        ModelError: the model has no such layers on a side that is asked for.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not wanted:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})  # reentrant, frozen inputs would starve the adapters below them
    if wanted == "offload":
        offload_inputs(model)
    if not isinstance(wanted, dict):
        return
    met = dict.fromkeys(wanted, 0)
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            side = family.side_of(name.removeprefix("base_model.model."))
            number = wanted.get(side, False)
            module.gradient_checkpointing = number if isinstance(number, bool) else met[side] < number
            met |= {side: met.get(side, 0) + 1}
    missing = [side for side, number in met.items() if wanted.get(side) and not number]
    if missing:
        raise ModelError(f"model.gradient_checkpointing.{missing[0]}: this model has no layers there that can be recomputed")
