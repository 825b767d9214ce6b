"""Which parts of a model are frozen, and which buffers training moves. A leaf: checkpoints and models read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def frozen_parts(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The largest parts that have weights, none of which trains. A module without weights (dropout) does as its parent does."""
    for child in module.children():
        if next(child.parameters(), None) is None:
            continue
        if _is_frozen(child):
            yield child
        else:
            yield from frozen_parts(child)


def _is_frozen(module: torch.nn.Module) -> bool:
    """Whether it has weights, and none of them trains."""
    weights = [parameter.requires_grad for parameter in module.parameters()]
    return bool(weights) and not any(weights)


def _is_moving(module: torch.nn.Module, leaf: str) -> bool:
    """Whether a buffer of this module is stored with it and may change in training: layers that hold others have constants only."""
    return not any(True for _ in module.children()) and leaf in module.state_dict(keep_vars=True)


def moving_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The stored buffers of the layers that train, by the names of `state_dict`: part of a training's state. Empty for most models."""
    frozen = {id(module) for part in frozen_parts(model) for module in part.modules()}
    return {
        f"{name}.{leaf}": buffer
        for name, module in model.named_modules()
        if id(module) not in frozen
        for leaf, buffer in module.named_buffers(recurse=False)
        if _is_moving(module, leaf)
    }
