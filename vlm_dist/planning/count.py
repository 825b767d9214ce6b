"""One micro-batch of a model, forward and backward, on shapes alone: what it holds, computes and moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vlm_dist.config import Config
from vlm_dist.errors import ModelError
from vlm_dist.families import Family
from vlm_dist.models.ahead import ahead_rule, stays_on_host
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.shared_rows import cutting
from vlm_dist.planning.counts import Count, Operation
from vlm_dist.planning.parts import Parts
from vlm_dist.planning.shapes import counting
from vlm_dist.planning.twin import autocast, build_twin
from vlm_dist.upstream.torch import disable_modes

LAUNCH = 5e-6
"""Seconds that PyTorch takes to launch an operation. Assumed."""
STATISTICS = ("absmax", "code", "offset")  # of a QuantState


@dataclass
class Counted:
    """Bytes and FLOPs of one rank, with nothing sharded."""

    weights: Counter[str] = field(default_factory=Counter)
    """Bytes of "4-bit", "statistics" (of 4 bit), "16-bit" (all else that is frozen) and "trainable" weights."""
    largest_layer: int = 0
    """Bytes of the weights of the largest module that is used as one."""
    largest_loaded: int = 0
    """Most bytes of one weight while it is loaded: as it is stored, in 16 bit, beside what it becomes."""
    trainable: list[int] = field(default_factory=list)
    """Elements of each trainable tensor."""
    saved: int = 0
    """Bytes that the forward pass keeps for the backward pass."""
    saved_vision: int = 0
    """Of these, the vision tower's."""
    peak: int = 0
    """Most bytes beside the weights at any moment; gradients are among them."""
    forward_flops: int = 0
    vision_flops: int = 0
    """Of the forward pass, the vision tower's."""
    backward_flops: int = 0
    """Products that are made again for a checkpoint are among them."""
    work: Counter[Operation] = field(default_factory=Counter)
    """How often each operation was launched."""
    waits: Counter[str] = field(default_factory=Counter)
    """How often the host waits for the device."""
    kept: Counter[str] = field(default_factory=Counter)
    """Of `saved`, what each part of the model made; see `count_micro_batch`."""
    sent: int = 0
    """Bytes that a rank sends to those that share its rows (engine.sequence_parallel)."""
    blocks: Counter[str] = field(default_factory=Counter)
    """Attention blocks of "vision" and "language"."""

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    @property
    def gradients(self) -> int:
        """Bytes, in float32."""
        return 4 * sum(self.trainable)

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Each operation as fast as products or memory allow, whichever takes longer (roofline; Williams et al. 2009), and no faster than
        one can be launched."""
        return sum(number * seconds_of(one, flops, bandwidth) for one, number in self.work.items())


def seconds_of(operation: Operation, flops: float, bandwidth: float) -> float:
    """One launch of it."""
    return max(operation.flops / flops, operation.moved / bandwidth, LAUNCH)


def count_micro_batch(
    config: Config, hf_config: Any, family: Family, dtype: torch.dtype, batch: dict[str, Any], *, on_gpu: bool = True,
    accumulates: bool = False, by_part: bool = False,
) -> Counted:  # fmt: skip
    """Run a micro-batch on shapes.

    Args:
        batch: as the stream gives it.
        on_gpu: with the kernels and the number types of a GPU; else as this CPU does.
        accumulates: gradients of earlier micro-batches are there.
        by_part: note which part of the model runs what (slower).

    Raises:
        ModelError: the model asks for numbers that are not there.
    """
    counted, parts = Counted(), Parts(family)
    with counting(on_gpu=on_gpu, part=parts.now) as shapes:
        model = build_twin(config, hf_config, family, dtype, shapes)
        _weigh(model, counted)
        with disable_modes():
            batch = ahead_rule(model)(batch)
        inputs = {name: shapes.without_data(given) if isinstance(given, torch.Tensor) else given for name, given in batch.items()}
        if accumulates:
            for parameter in model.parameters():
                parameter.grad = torch.zeros(parameter.shape) if parameter.requires_grad else None
        for name, given in inputs.items():
            if isinstance(given, torch.Tensor):
                (shapes.leave_on_host if stays_on_host(name, inputs) else shapes.hold)(given)
        count = shapes.count
        count.mark()
        before, held = count.live, shapes.held
        try:
            with cutting(model), parts.watching(model if by_part else None) as counted.blocks:
                with autocast(dtype), _watching_vision(model, family, count, counted):
                    loss = summed_loss(model, inputs)
                counted.saved, counted.forward_flops, counted.kept = count.live - before, count.flops, shapes.held - held
                torch.autograd.backward(loss)  # not loss.backward(), inside of which modes on functions are off
        except Exception as error:  # a model's code raises whatever it likes where numbers are missing
            what = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(f"plan: '{family.model_type}' cannot be run without its numbers ({what}); train without a plan") from error
        counted.backward_flops = count.flops - counted.forward_flops
        counted.peak = count.peak - before + (counted.gradients if accumulates else 0)
        counted.work, counted.waits = count.work, count.waits
        counted.sent = getattr(getattr(model, "sequence_cut", None), "sent", 0)
    return counted


def _weigh(model: Any, counted: Counted) -> None:
    """Bytes of the weights; those that two modules share are counted once."""
    seen: set[int] = set()
    for module in model.modules():
        here = 0
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            size, state = tensor.numel() * tensor.element_size(), getattr(tensor, "quant_state", None)
            here += size
            becomes = size if tensor.requires_grad or state is not None else 0
            counted.largest_loaded = max(counted.largest_loaded, becomes + 2 * (tensor.numel() if state is None else state.shape.numel()))
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if tensor.requires_grad:
                counted.weights["trainable"] += size
                counted.trainable.append(tensor.numel())
            else:
                counted.weights["4-bit" if state is not None else "16-bit"] += size
            if state is not None:
                counted.weights["statistics"] += quant_state_bytes(state)
        counted.largest_layer = max(counted.largest_layer, here)


def quant_state_bytes(state: Any) -> int:
    """Scales, and scales of scales, of a 4-bit weight (bitsandbytes' QuantState)."""
    inner = [getattr(state, name) for name in STATISTICS]
    outer = [state.state2.absmax, state.state2.code] if state.state2 is not None else []
    return sum(tensor.numel() * tensor.element_size() for tensor in [*inner, *outer] if isinstance(tensor, torch.Tensor))


@contextmanager
def _watching_vision(model: Any, family: Family, count: Count, counted: Counted) -> Iterator[None]:
    """What the vision tower alone keeps and computes, in the forward pass."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tower = base.get_submodule(family.vision)
    start = [0, 0]

    def begin(*_: Any) -> None:
        start[:] = [count.live, count.flops]

    def end(*_: Any) -> None:
        counted.saved_vision += count.live - start[0]
        counted.vision_flops += count.flops - start[1]

    hooks = [tower.register_forward_pre_hook(begin), tower.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
