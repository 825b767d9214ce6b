"""Adapters on experts: which weights get one, PEFT's own form (`target_parameters`), and our computing of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlm_dist.config import LoraConfig
from vlm_dist.errors import ModelError
from vlm_dist.families import Family
from vlm_dist.models.experts import expert_modules, expert_weights, not_read, routers

LAST_NUMBER = re.compile(r".*\.\d+\.")


def experts_choice(model: Any, config: LoraConfig) -> tuple[bool, str]:
    """Whether the experts of this model get adapters, and why, in words; empty where it has no experts.

    Raises:
        ModelError: adapters on experts were asked of a model that has none, or of experts that train whole.
    """
    if not expert_modules(model):
        if config.experts == "lora" or config.router == "full":
            what = "lora.experts=lora" if config.experts == "lora" else "lora.router=full"
            raise ModelError(f"{what}: this model has no experts that are found; leave it out")
        return False, ""
    whole = next((name for name in config.modules_to_save if _holds_experts(name, model)), None)
    if whole and config.experts == "lora":
        raise ModelError(f"lora.modules_to_save: '{whole}' holds experts, which lora.experts=lora adapts; leave one of the two out")
    if config.experts != "auto":
        return config.experts == "lora", f"lora.experts={config.experts}"
    reasons = {
        "lora.language": not config.language, "lora.mlp": not config.mlp, "lora.dropout": config.dropout > 0, "lora.dora": config.dora,
        "lora.modules": bool(config.modules), "lora.modules_to_save": whole is not None,
    }  # fmt: skip
    against = [name for name, holds in reasons.items() if holds]
    return not against, f"lora.experts=auto: {'off, by ' + against[0] if against else 'lora'}"


def _holds_experts(name: str, model: Any) -> bool:
    return any(f".{name}." in f".{path}." for path in expert_modules(model))


def experts_in_words(model: Any, config: LoraConfig) -> str:
    """How many experts there are and what was chosen for them; nothing of a model without."""
    modules = [module for path, module in expert_modules(model).items() if not path.endswith(".original_module")]
    if (odd := not_read(model)) and not modules:
        return f"experts: those of this architecture cannot be read ({odd[0]}, ...): they stay in 16 bit and have no adapter"
    if not modules:
        return ""
    ranks = f" of rank {config.r_experts} on each" if (choice := experts_choice(model, config))[0] else ""
    taken = sorted(taken_for_experts(model) - {"gate"})
    lacking = f"; PEFT takes {', '.join(taken)} for experts here, so linear layers of these names have no adapter" if taken else ""
    return f"experts: {len(modules)} layers of {modules[0].num_experts}; {choice[1]}{ranks}; router {config.router}{lacking}"


def expert_targets(model: Any, family: Family, config: LoraConfig, in_layer: Any) -> list[str]:
    """Paths of the experts' weights that get adapters.

    Args:
        in_layer: whether a path lies in a layer that was chosen, of all these paths.
    """
    if not experts_choice(model, config)[0]:
        return []
    names = list(expert_weights(model))
    return [name for name in names if family.side_of(name) == "language" and in_layer(name, names)]


def as_target_parameters(chosen: list[str], model: Any) -> list[str] | None:
    """PEFT's `target_parameters`: endings that all layers share where every layer is meant, else whole paths."""
    if not chosen:
        return None
    endings = {LAST_NUMBER.sub("", name) for name in chosen}
    meant = [name for name in expert_weights(model) if any(name.endswith("." + ending) for ending in endings)]
    return sorted(endings) if sorted(meant) == sorted(chosen) else sorted(chosen)


def expert_ranks(chosen: list[str], config: LoraConfig) -> tuple[dict[str, int], dict[str, float]]:
    """PEFT's rank_pattern and alpha_pattern for them. Without an alpha of their own they are scaled as the rest is."""
    if not chosen:
        return {}, {}
    pattern = "|".join(sorted({rf"{re.escape(LAST_NUMBER.sub('', name))}" for name in chosen}))
    share = config.r_experts / (config.r_language or config.r)
    alpha = (config.alpha_language or config.alpha) * (share**0.5 if config.rslora else share)
    return {pattern: config.r_experts}, {pattern: config.alpha_experts or alpha}


def router_endings(model: Any) -> list[str]:
    """What the paths of the routers end with, for PEFT's `modules_to_save`."""
    return sorted({LAST_NUMBER.sub("", name) for name in routers(model)})


def taken_for_experts(model: Any) -> set[str]:
    """Names of linear layers that cannot have an adapter in this architecture, because PEFT takes them for experts."""
    from vlm_dist.upstream import peft

    return peft.taken_for_experts(model.config.model_type) if expert_modules(model) else set()


def prepare_experts(model: Any, config: Any) -> Any:
    """A LoraConfig of PEFT whose adapters on this model's experts will be ours."""
    from vlm_dist.upstream.peft import wrap_experts

    kinds = {type(module) for module in expert_modules(model).values()}
    if kinds and getattr(config, "target_parameters", None):
        wrap_experts(config, kinds)
    return config


@contextmanager
def ranks_of_parameters() -> Iterator[None]:
    """PEFT 0.21 looks for the names of a rank_pattern among modules only, and warns of those of parameters, though it keeps to them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(rank|alpha)_pattern.*")
        yield


def gather_with_experts(model: Any) -> None:
    """ZeRO stage 3 gathers a weight around its own module's call; adapters on experts are read in the call of their wrapper."""
    import deepspeed

    from vlm_dist.upstream.peft import ParamWrapper

    for module in model.modules():
        if isinstance(module, ParamWrapper):
            for factors in module.factors().values():
                for a, b, _ in factors:
                    deepspeed.zero.register_external_parameter(module, a)
                    deepspeed.zero.register_external_parameter(module, b)
