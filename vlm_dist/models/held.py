"""What of a model is held in 16 bit beside 4-bit weights, and what has no adapter beside weights that have one: by name and size."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from vlm_dist.models.experts import expert_weights

TO_THE_LAYER = re.compile(r".*\.\d+\.")
SMALL = "norms and biases"
SHOWN = 8  # names of a line; the smallest are summed up


def in_16bit(model: Any) -> Counter[str]:
    """Elements of the weights that are neither packed nor train, by name; nothing where none is packed."""
    found: Counter[str] = Counter()
    packed = 0
    for name, parameter in model.named_parameters():
        if _is_packed(parameter):
            packed += 1
        elif not parameter.requires_grad and ".original_module." not in name:
            found[_named(name, model) if parameter.ndim > 1 else SMALL] += getattr(parameter, "ds_numel", parameter.numel())
    return found if packed else Counter()


def without_adapter(model: Any) -> Counter[str]:
    """Elements of the weights of linear layers and experts that are frozen and have no adapter, by name; nothing where none has one."""
    if not hasattr(model, "peft_config"):
        return Counter()
    found: Counter[str] = Counter()
    experts = {id(weight): weight for weight in expert_weights(model).values()}
    adapted = _adapted(model)
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        if ".original_module." in name:  # a copy beside it trains
            continue
        is_linear = name.endswith(".weight") and hasattr(model.get_submodule(path), "in_features")
        if (is_linear or id(parameter) in experts) and not parameter.requires_grad and id(parameter) not in adapted:
            state = getattr(parameter, "quant_state", None)
            found[_named(name, model)] += state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
    return found


def weights_in_words(model: Any, dtype: str) -> list[str]:
    """One line about each, for people."""
    lines = []
    if found := in_16bit(model):
        lines.append(f"in {dtype}, not in 4 bit: {_listed(found)}")
    if found := without_adapter(model):
        lines.append(f"without adapter: {_listed(found)}")
    return lines


def _listed(found: Counter[str]) -> str:
    shown, rest = found.most_common()[:SHOWN], found.most_common()[SHOWN:]
    words = [f"{name} {number:,}" for name, number in shown]
    return ", ".join(words + ([f"{len(rest)} more {sum(number for _, number in rest):,}"] if rest else []))


def _is_packed(parameter: Any) -> bool:
    return type(parameter).__name__ == "Params4bit" or getattr(parameter, "packs", False)


def _named(name: str, model: Any) -> str:
    """A weight's path from its layer on, or its module's name where it lies in none; that of experts with the weight's."""
    plain = name.replace(".base_layer", "").removeprefix("base_model.model.").removesuffix(".weight")
    within = TO_THE_LAYER.sub("", plain)
    return within if within != plain else plain.rpartition(".")[2]


def _adapted(model: Any) -> set[int]:
    """The ids of the weights that have an adapter of PEFT."""
    from peft.tuners.lora import LoraLayer

    found = set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            name = getattr(module, "parameter_name", "weight")
            found.add(id(getattr(module.get_base_layer(), name)))
    return found
