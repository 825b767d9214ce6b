"""Training and evaluation mode by part, and the buffers that training moves (running statistics of BatchNorm).

A frozen part stays in evaluation mode: its dropout and stochastic depth would add noise to features that nothing learns from, and its
BatchNorm would move statistics that belong to weights which stay as they are (the adapter would fit a base that no one has).
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlm_dist.buffers import frozen_parts, moving_buffers
from vlm_dist.families import Family
from vlm_dist.upstream.transformers import still_when_recomputed

if TYPE_CHECKING:
    import torch

    from vlm_dist.distributed import Ranks


def hold_frozen(model: Any) -> Any:
    """From now on `model.train()` leaves the parts without a trainable weight in evaluation mode, whoever calls it; only what a layer
    needs to recompute its activations stays on, for gradients may pass through it. What it moves is held in float32.

    Returns:
        The model.
    """
    model.train = types.MethodType(_train, model)
    for name, buffer in moving_buffers(model).items():
        if buffer.is_floating_point():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, buffer.float())
    return model.train(model.training)


def _train(model: Any, mode: bool = True) -> Any:
    type(model).train(model, mode)
    for part in frozen_parts(model) if mode else ():
        part.train(False)
        for layer in part.modules():
            still_when_recomputed(layer)
    return model


def batch_norms(model: torch.nn.Module, family: Family) -> Counter[str]:
    """How many BatchNorm layers move their statistics in training, by side."""
    import torch

    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)
    moving = {name.rpartition(".")[0] for name in moving_buffers(model)}
    return Counter(
        family.side_of(name.removeprefix("base_model.model."))
        for name, module in model.named_modules()
        if name in moving and isinstance(module, kinds)
    )


WITH_BATCH_NORM = "freeze that side (model.freeze), or raise training.micro_batch"


def batch_norms_in_words(counts: Counter[str], micro_batch: int) -> str:
    """What a user should know of them; empty where there are none."""
    if not counts:
        return ""
    sides = " and ".join(f"{number} layers of the {side} side" for side, number in sorted(counts.items()))
    return (
        f"BatchNorm trains in {sides}: each micro-batch ({micro_batch} rows) is normalised by its own mean and variance, and the running "
        "ones, which evaluation uses, move; with few pictures a micro-batch they are poor"
    )


@contextmanager
def buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Whatever runs inside moves no buffer."""
    kept = {name: buffer.detach().clone() for name, buffer in moving_buffers(model).items()}
    try:
        yield
    finally:
        for name, buffer in moving_buffers(model).items():
            buffer.copy_(kept[name].to(buffer.device))


class Statistics:
    """The moving buffers of a model under training: one value on all ranks after each step, and no value that is not finite."""

    def __init__(self, model: torch.nn.Module, ranks: Ranks):
        self.buffers, self.ranks = moving_buffers(model), ranks
        self._good = self._copy()

    def settle(self) -> None:
        """After a step, on every rank: the mean over the ranks; where that is not finite (a bad batch) what was there before."""
        import torch

        for name, buffer in self.buffers.items():
            if buffer.is_floating_point():
                mean = self.ranks.mean(buffer)
                buffer.copy_(mean if bool(torch.isfinite(mean).all()) else self._good[name])
        self.keep()

    def put_back(self) -> None:
        """As after the last step: this one is computed again."""
        for name, buffer in self.buffers.items():
            buffer.copy_(self._good[name])

    def keep(self) -> None:
        """What is there now is good: after a step, or when a checkpoint was put back."""
        self._good = self._copy()

    def _copy(self) -> dict[str, Any]:
        return {name: buffer.detach().clone() for name, buffer in self.buffers.items()}
