"""Which weights train: LoRA on chosen sides, through PEFT, or every weight of the sides that are not frozen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from vlm_dist.config import LoraConfig
from vlm_dist.errors import ModelError
from vlm_dist.families import Family
from vlm_dist.models.experts_lora import (
    as_target_parameters,
    expert_ranks,
    expert_targets,
    prepare_experts,
    ranks_of_parameters,
    router_endings,
    taken_for_experts,
)

LAYER = re.compile(r"(.*?)\.(\d+)\.")  # a module's name up to the number of its layer

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
    from peft.utils.constants import DUMMY_TARGET_MODULES  # where only whole modules train

    modules, experts = find_targets(model, family, config), find_expert_targets(model, family, config)
    whole = trained_whole(family, config) + (router_endings(model) if config.router == "full" else [])
    if not modules and not whole and not experts:
        raise ModelError(
            f"lora: no linear layer of '{family.model_type}' matches vision={config.vision}, language={config.language}, "
            f"attention={config.attention}, mlp={config.mlp}, modules={config.modules or 'all'}, layers={config.layers or 'all'}"
        )
    if config.projector == "lora" and not any(family.side_of(name) == "projector" for name in modules):
        raise ModelError(f"lora.projector: the projector of '{family.model_type}' has no linear layer to adapt; use full or frozen")
    names = [name for name, _ in model.named_modules()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ranks, alphas = expert_ranks(experts, config)
    peft_config = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules=_as_target_modules(modules, names, model) if modules else [] if experts else DUMMY_TARGET_MODULES,
        target_parameters=as_target_parameters(experts, model),
        rank_pattern=_by_side(config, "r", family, modules, names) | ranks,
        alpha_pattern=_by_side(config, "alpha", family, modules, names) | alphas,
        modules_to_save=[part for name in whole for part in _trainable_whole(name, model, names)] or None,
        bias=config.bias,
        use_rslora=config.rslora,
        use_dora=config.dora,
    )
    with ranks_of_parameters():
        return peft.get_peft_model(model, prepare_experts(model, peft_config))  # pyright: ignore[reportReturnType]


def trained_whole(family: Family, config: LoraConfig) -> list[str]:
    """Modules whose own weights train, so that they must not be quantised."""
    return [*(family.projector if config.projector == "full" else ()), *config.modules_to_save]


def find_targets(model: torch.nn.Module, family: Family, config: LoraConfig) -> list[str]:
    """Names of the linear layers that the configuration chooses.

    Raises:
        ModelError: a name of `lora.modules` or a number of `lora.layers` does not exist.
    """
    import torch

    sides = {side for side, wanted in (("vision", config.vision), ("language", config.language)) if wanted}
    if config.projector == "lora":
        sides.add("projector")
    parents = (family.attention if config.attention else ()) + (family.mlp if config.mlp else ())
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]  # bitsandbytes' Linear4bit is one
    leaves = {name.rpartition(".")[2] for name in linear}
    if unknown := sorted(set(config.modules) - leaves):
        raise ModelError(f"lora.modules: no linear layer is called '{unknown[0]}'; there are: {', '.join(sorted(leaves))}")
    taken = taken_for_experts(model)
    return [
        name
        for name in linear
        if family.side_of(name) in sides
        and name.rpartition(".")[2] not in taken
        and (family.side_of(name) == "projector" or not set(parents).isdisjoint(name.split(".")))
        and (not config.modules or name.rpartition(".")[2] in config.modules)
        and _in_chosen_layer(name, family, config, linear)
        and not _is_idle(name, model, family)
    ]


def _as_target_modules(modules: list[str], names: list[str], model: torch.nn.Module) -> str | list[str]:
    """One pattern; of an architecture whose patterns PEFT takes apart into names, the whole paths."""
    return modules if taken_for_experts(model) else as_pattern(modules, names)


def find_expert_targets(model: torch.nn.Module, family: Family, config: LoraConfig) -> list[str]:
    """Paths of the experts' weights that the configuration adapts.

    Raises:
        ModelError: it asks for adapters on experts, and the model has none.
    """
    return expert_targets(model, family, config, lambda name, names: _in_chosen_layer(name, family, config, names))


def _in_chosen_layer(name: str, family: Family, config: LoraConfig, linear: list[str]) -> bool:
    wanted = config.layers.get(family.side_of(name))  # pyright: ignore[reportArgumentType]
    if wanted is None:
        return True
    place = LAYER.match(name)
    if place is None:
        return False
    depth = 1 + max(int(other[2]) for other in map(LAYER.match, linear) if other and other[1] == place[1])
    if outside := [number for number in wanted if not -depth <= number < depth]:
        raise ModelError(f"lora.layers: {family.side_of(name)} has layers 0 to {depth - 1}, not {outside[0]}")
    return int(place[2]) in {number % depth for number in wanted}


def _by_side(config: LoraConfig, what: str, family: Family, modules: list[str], names: list[str]) -> dict[str, Any]:
    """PEFT's rank_pattern or alpha_pattern for the sides that have a value of their own."""
    values = {side: getattr(config, f"{what}_{side}") for side in ("vision", "projector", "language")}
    chosen = {side: [name for name in modules if family.side_of(name) == side] for side, value in values.items() if value is not None}
    return {as_pattern(members, names): values[side] for side, members in chosen.items() if members}


def _trainable_whole(name: str, model: PreTrainedModel, names: list[str]) -> list[str]:
    """The name as PEFT takes it: of a list of modules, which has no forward of its own, the modules."""
    import torch

    found = [other for other in names if other == name or other.endswith("." + name)]
    if not found:
        raise ModelError(f"lora.modules_to_save: the model has no module '{name}'; give one such as lm_head or embed_tokens")
    if any(hasattr(parameter, "quant_state") for other in found for parameter in model.get_submodule(other).parameters()):
        raise ModelError(
            f"lora.modules_to_save: '{name}' is held in 4 bit, so it cannot train whole; load the model with load_in_4bit=False"
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight and {id(head), id(embedding)} & {id(model.get_submodule(o)) for o in found}:
        raise ModelError(f"lora.modules_to_save: '{name}' shares its weights between input and output in this model; it cannot train alone")
    lists = [other for other in found if isinstance(model.get_submodule(other), torch.nn.ModuleList)]
    return [f"{other}.{number}" for other in lists for number in range(len(model.get_submodule(other)))] or [name]  # pyright: ignore[reportArgumentType]


def _is_idle(name: str, model: torch.nn.Module, family: Family) -> bool:
    """Whether no gradient comes to a module, so that adapters on it would never learn: pooling heads, the vision layers above the one
    whose features the model takes (LLaVA takes the last but one), and a sparse attention's indexer, which only chooses keys."""
    if any(name.startswith(path + ".") for path in family.unused) or "indexer" in name.split("."):
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
    """Train every weight except those of the given sides, and those that the model never uses."""
    frozen = set(sides)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains_fully(name, family, frozen))


def trains_fully(name: str, family: Family, frozen: Collection[str]) -> bool:
    """Whether a weight trains where every weight does but those of these sides."""
    return family.side_of(name) not in frozen and not any(name.startswith(path + ".") for path in family.unused)


def count_trainable(model: torch.nn.Module, family: Family) -> Counter[str]:
    """Trainable parameters by side, and all parameters as 'total' (4-bit weights counted as the weights they hold, sharded ones whole)."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        number = getattr(parameter, "ds_numel", parameter.numel())
        counts["total"] += state.shape.numel() if state is not None else number
        if parameter.requires_grad:
            counts[family.side_of(name.removeprefix("base_model.model."))] += number
    return counts
