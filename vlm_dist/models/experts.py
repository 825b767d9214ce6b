"""Mixture-of-experts layers: where a model has them, and that they compute as `experts_compute` does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_dist.upstream.transformers import is_experts, register_experts

if TYPE_CHECKING:
    from vlm_dist.config import Config

OURS = "vlm_dist"  # the name of our implementation in transformers' table
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
ROUTERS = ("gate", "router")
NEVER_IN_4BIT = (r".*\.router(\.|$)", r".*\.(mlp|feed_forward|moe|block_sparse_moe)\.gate$", r".*\.shared_expert_gate$")
"""Small, and all that follows hangs on what they choose."""
COEFFICIENT = "router_aux_loss_coef"  # as transformers' configurations call it


def expert_modules(model: Any) -> dict[str, Any]:
    """The modules that hold the experts of a layer, by path."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def expert_weights(model: Any) -> dict[str, Any]:
    """Their weights [E, X, Y] (or packed in NF4), by path."""
    return {
        f"{path}.{name}": getattr(module, name)
        for path, module in expert_modules(model).items()
        for name in WEIGHTS
        if getattr(module, name, None) is not None
    }


def of_experts(name: str) -> bool:
    """Whether a parameter of this name is an expert's, or an adapter's on one."""
    return ".experts." in name


def balance_weight(model: Any, config: Config) -> float:
    """training.router_aux_loss, or what the model's own configuration says where its routers train."""
    if config.training.router_aux_loss is not None:
        return config.training.router_aux_loss
    trains = config.lora is None or config.lora.router == "full"
    return float(getattr(model.config.get_text_config(), COEFFICIENT, None) or 0.0) if trains and expert_modules(model) else 0.0


def routers(model: Any) -> list[str]:
    """Paths of the modules that choose among the experts: they lie beside them."""
    found = []
    for path in expert_modules(model):
        around = path.rpartition(".")[0]
        names = dict(model.get_submodule(around).named_children())
        found += [f"{around}.{name}" for name in ROUTERS if name in names]
    return found


def register() -> None:
    """Our implementation in transformers' table."""
    from vlm_dist.models.experts_compute import compute_experts

    register_experts(OURS, compute_experts)


def not_read(model: Any) -> list[str]:
    """Paths of weights that are experts by their name and shape, in a form that has no implementation by name."""
    found = {id(weight) for weight in expert_weights(model).values()}
    return [name for name, weight in model.named_parameters() if of_experts(name) and weight.ndim == 3 and id(weight) not in found]


def use_our_experts(model: Any) -> None:
    """Let the model's experts compute as `compute_experts` does, if it has any."""
    if expert_modules(model):
        register()
        model.set_experts_implementation(OURS)
