"""Which weights train: LoRA on chosen sides, through PEFT, or every weight of the sides that are not frozen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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
    if not modules and config.projector != "full":
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
        target_modules=as_pattern(modules, (name for name, _ in model.named_modules())) if modules else [],
        modules_to_save=[path for path in family.projector if config.projector == "full"] or None,
        use_rslora=config.rslora,
        use_dora=config.dora,
    )
    return peft.get_peft_model(model, peft_config)  # pyright: ignore[reportReturnType]


def find_targets(model: torch.nn.Module, family: Family, config: LoraConfig) -> list[str]:
    """Names of the linear layers that the configuration chooses."""
    import torch

    sides = {side for side, wanted in (("vision", config.vision), ("language", config.language)) if wanted}
    if config.projector == "lora":
        sides.add("projector")
    parents = (family.attention if config.attention else ()) + (family.mlp if config.mlp else ())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)  # bitsandbytes' Linear4bit is one
        and family.side_of(name) in sides
        and (family.side_of(name) == "projector" or not set(parents).isdisjoint(name.split(".")))
        and not _is_idle(name, model, family)
    ]


def _is_idle(name: str, model: torch.nn.Module, family: Family) -> bool:
    """Whether a module runs for nothing, so that adapters on it would never learn: pooling heads, and the vision layers above the one
    whose features the model takes (LLaVA takes the last but one)."""
    if any(name.startswith(path + ".") for path in family.unused):
        return True
    config: Any = model.config
    chosen = getattr(config, "vision_feature_layer", None)
    layer = re.match(rf"{re.escape(family.vision)}\..*\blayers?\.(\d+)\.", name)
    if chosen is None or layer is None:
        return False
    depth = config.vision_config.num_hidden_layers
    return int(layer[1]) >= max(
        number if number >= 0 else depth + 1 + number for number in (chosen if isinstance(chosen, list) else [chosen])
    )


def as_pattern(names: Iterable[str], all_names: Iterable[str]) -> str:
    """A regular expression that matches `names` and none of `all_names` else: `\\d+` stands for the layer number where every layer is
    meant, so that it stays short and readable in adapter_config.json."""
    chosen: dict[str, list[str]] = {}
    for name in names:
        chosen.setdefault(_form(name), []).append(name)
    existing = Counter(_form(name) for name in all_names)
    patterns = []
    for form, members in chosen.items():
        whole = len(members) == existing[form]
        patterns += [form] if whole else [re.escape(name) for name in members]
    return "|".join(patterns)


def _form(name: str) -> str:
    """The pattern of a module's name in which any layer number will do."""
    return re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name))


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
