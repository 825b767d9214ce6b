"""Inputs of recomputed layers in host memory: on the card nothing is left of a layer between its forward and its backward pass.

A layer that is recomputed keeps its input alone (models/checkpointing.py). Here it is copied to pinned memory beside the computation, and
comes back while the layer after it is computed backwards. Numbers are not changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from vlm_dist.upstream.torch import FakeTensor
from vlm_dist.upstream.transformers import around_recomputing

LEAST_BYTES = 1 << 16
"""A smaller tensor stays where it is."""


class _Counted:
    """What is away while a plan counts: its shape."""

    def __init__(self, tensor: torch.Tensor):
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device

    def back(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class _Away:
    """A tensor in host memory, and the one that went before it, which comes back next."""

    def __init__(self, tensor: torch.Tensor, beside: torch.cuda.Stream, before: _Away | None):
        self.device, self.beside, self.before = tensor.device, beside, weakref.ref(before) if before is not None else lambda: None
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self.fetched: torch.Tensor | None = None
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(beside)

    def fetch(self) -> None:
        if self.fetched is None:
            with torch.cuda.stream(self.beside):
                self.fetched = self.host.to(self.device, non_blocking=True)

    def back(self) -> torch.Tensor:
        self.fetch()
        assert self.fetched is not None
        here = torch.cuda.current_stream()
        here.wait_stream(self.beside)  # before the next one is asked for
        if (before := self.before()) is not None:
            before.fetch()
        tensor, self.fetched = self.fetched, None
        tensor.record_stream(here)
        return tensor


class InputsAway:
    """Wraps transformers' function that runs a layer to be recomputed."""

    def __init__(self) -> None:
        self._beside: torch.cuda.Stream | None = None
        self._last: Callable[[], _Away | None] = lambda: None

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def running(*arguments: Any, **options: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):  # what is saved inside, the layer's own hooks forget
                return run(*arguments, **options)

        return running

    def _pack(self, tensor: torch.Tensor) -> Any:
        if tensor.numel() * tensor.element_size() < LEAST_BYTES or not tensor.is_floating_point() or isinstance(tensor, torch.nn.Parameter):
            return tensor
        if isinstance(tensor, FakeTensor):
            return _Counted(tensor)
        if not tensor.is_cuda:
            return tensor
        self._beside = self._beside or torch.cuda.Stream()
        away = _Away(tensor.detach(), self._beside, self._last())
        self._last = weakref.ref(away)
        return away


def _unpack(kept: Any) -> torch.Tensor:
    return kept if isinstance(kept, torch.Tensor) else kept.back()


def offload_inputs(model: Any) -> None:
    """Keep the inputs of layers that are recomputed in host memory; on a CPU they stay where they are."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    away = InputsAway()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            around_recomputing(module, away.around)
