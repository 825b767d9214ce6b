"""Which weights train: LoRA on chosen sides, through PEFT, or every weight of the sides that are not frozen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vlm_dist.config import LoraConfig
from vlm_dist.errors import ModelError
from vlm_dist.families import Family

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, family: Family, config: LoraConfig) -> PeftModel:
    """Freeze the base and put adapters on the chosen sides' attention and MLP projections (fp32, whatever the base).

    Raises:
        ModelError: no linear layer matches the choice.
    """
    import peft

    modules = find_targets(model, family, config)
    if not modules:
        raise ModelError(
            f"lora: no linear layer of '{family.model_type}' matches vision={config.vision}, language={config.language}, "
            f"attention={config.attention}, mlp={config.mlp}"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    peft_config = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules=as_pattern(modules),
    )
    return peft.get_peft_model(model, peft_config)  # pyright: ignore[reportReturnType]


def find_targets(model: torch.nn.Module, family: Family, config: LoraConfig) -> list[str]:
    """Names of the linear layers that the configuration chooses."""
    import torch

    sides = {side for side, wanted in (("vision", config.vision), ("language", config.language)) if wanted}
    parents = (family.attention if config.attention else ()) + (family.mlp if config.mlp else ())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)  # bitsandbytes' Linear4bit is one
        and family.side_of(name) in sides
        and not set(parents).isdisjoint(name.split("."))
    ]


def as_pattern(names: Iterable[str]) -> str:
    """A regular expression for these module names, whatever the layer numbers: short, and readable in adapter_config.json."""
    forms = dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name)) for name in names)
    return "|".join(forms)


def freeze_sides(model: torch.nn.Module, family: Family, sides: Iterable[str]) -> None:
    """Train every weight except those of the given sides."""
    frozen = set(sides)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(family.side_of(name) not in frozen)


def count_trainable(model: torch.nn.Module, family: Family) -> Counter[str]:
    """Trainable parameters by side, and all parameters as 'total' (4-bit weights counted as the weights they hold)."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        counts["total"] += state.shape.numel() if state is not None else parameter.numel()
        if parameter.requires_grad:
            counts[family.side_of(name.removeprefix("base_model.model."))] += parameter.numel()
    return counts
