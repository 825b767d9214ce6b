"""Products of tokens with the weights of the experts that they were sent to, tokens sorted by expert.

Letters of shapes: S places (a token sent to an expert), E experts, I and O features in and out, R a rank. A weight is [E, X, Y] in 16 or
32 bit, or packed in NF4; of that only the experts that were hit are unpacked, into a buffer that all layers share, and nothing unpacked
is kept for the backward pass. The operations are torch's too (`torch.ops.vlm_dist.*`), so that a plan can count them without numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import vlm_kernels
from vlm_kernels.common import multiplies_tiles
from vlm_kernels.operation import operation

ALIGNED = 16  # bytes: what grouped_mm wants rows to be a multiple of
_BUFFERS: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def expert_linear(x_SI: Tensor, weight: Tensor, counts_E: Tensor, *, transposed: bool = False) -> Tensor:
    """Each token times the weight of its expert: [S, O], in x's number type.

    Args:
        x_SI: tokens sorted by expert.
        weight: [E, O, I], or [E, I, O] with `transposed`; plain, or packed in NF4 (it then has a `quant_state` of that shape).
        counts_E: how many places each expert has; they add up to S.
    """
    return _ExpertLinear.apply(x_SI, weight, counts_E, not transposed)


def expert_lora(x_SI: Tensor, a: Tensor, b: Tensor, counts_E: Tensor, scaling: float) -> Tensor:
    """Each token times the low-rank update of its expert (Hu et al. 2021, arXiv:2106.09685): scaling B_e A_e x, [S, O].

    Args:
        a: [E R, I], the experts' A one below another, as PEFT keeps them.
        b: [O, R E], as PEFT keeps them: the expert varies fastest.
    """
    return _ExpertLora.apply(x_SI, a, b, counts_E, scaling)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, counts: Tensor, last: bool) -> Tensor:
        ctx.weight, ctx.last = weight, last  # the parameter itself: at ZeRO stage 3 its numbers are gathered again for the backward pass
        ctx.save_for_backward(counts, x if weight.requires_grad else None)
        return _multiply(x, weight, counts, last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        counts, x = ctx.saved_tensors
        to_x = _multiply(grad, ctx.weight, counts, not ctx.last) if ctx.needs_input_grad[0] else None
        if x is None:
            return to_x, None, None, None
        left, right = (grad, x) if ctx.last else (x, grad)
        return to_x, expert_outer(left.contiguous(), right, counts).to(ctx.weight.dtype), None, None


class _ExpertLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, counts: Tensor, scaling: float) -> Tensor:
        by_a, by_b = _by_expert(a, b, len(counts), x.dtype)
        inner = expert_product(x, by_a, [], counts, [], True)
        ctx.a, ctx.b, ctx.scaling = a, b, scaling
        ctx.save_for_backward(x, inner, counts)
        return expert_product(inner, by_b, [], counts, [], True) * scaling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, counts = ctx.saved_tensors
        by_a, by_b = _by_expert(ctx.a, ctx.b, len(counts), x.dtype)
        grad = grad.contiguous() * ctx.scaling
        to_inner = expert_product(grad, by_b, [], counts, [], False)
        to_b = expert_outer(grad, inner, counts).permute(1, 2, 0).reshape(ctx.b.shape).to(ctx.b.dtype)
        to_a = expert_outer(to_inner, x, counts).reshape(ctx.a.shape).to(ctx.a.dtype)
        to_x = expert_product(to_inner, by_a, [], counts, [], False) if ctx.needs_input_grad[0] else None
        return to_x, to_a, to_b, None, None


def _by_expert(a: Tensor, b: Tensor, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[E, R, I] and [E, O, R]."""
    by_b = b.detach().to(dtype).view(len(b), -1, experts).permute(2, 0, 1).contiguous()
    return a.detach().to(dtype).view(experts, -1, a.shape[-1]), by_b


def _multiply(x: Tensor, weight: Any, counts: Tensor, last: bool) -> Tensor:
    state = getattr(weight, "quant_state", None)
    data = weight.detach() if state is None else weight.data
    if state is None:
        return expert_product(x, data.to(x.dtype), [], counts, [], last)
    outer = state.state2
    statistics = [state.absmax, state.code, state.offset, outer.absmax, outer.code]
    return expert_product(x, data, statistics, counts, [*state.shape, state.blocksize, outer.blocksize], last)


@operation("vlm_dist::expert_product")
def expert_product(x: Tensor, weight: Tensor, statistics: Sequence[Tensor], counts: Tensor, packed: Sequence[int], last: bool) -> Tensor:
    """Each row of x [S, .] times the weight [E, X, Y] of its expert: over Y with `last` ([S, X]), else over X ([S, Y]).

    Args:
        statistics: of a packed weight absmax, code, offset, absmax and code of the absmax; empty for a plain one.
        packed: of a packed weight its shape E, X, Y and the sizes of inner and outer blocks; empty for a plain one.
    """
    shape = list(packed[:3]) or list(weight.shape)
    if _multiplies_groups(x):
        if packed:
            hit = counts.nonzero().squeeze(1)
            weight, counts = _unpack(weight, statistics, packed, x.dtype, hit), counts[hit]
        if not _has_grouped_mm(x):
            return vlm_kernels.grouped_linear(x, weight, counts, transposed=not last)
        return _grouped(x, weight.transpose(-2, -1) if last else weight, counts.cumsum(0, dtype=torch.int32))
    y, start = x.new_empty((len(x), shape[1] if last else shape[2])), 0
    scales = _scales(statistics, packed) if packed else None
    for expert, number in enumerate(counts.tolist()):
        if number:
            one = _unpack_one(weight, statistics, packed, x.dtype, scales, expert) if scales is not None else weight[expert]
            torch.mm(x[start : start + number], one.T if last else one, out=y[start : start + number])
            start += number
    return y


@expert_product.register_fake
def _(x: Tensor, weight: Tensor, statistics: Sequence[Tensor], counts: Tensor, packed: Sequence[int], last: bool) -> Tensor:
    shape = list(packed[:3]) or list(weight.shape)
    return x.new_empty((len(x), shape[1] if last else shape[2]))


@operation("vlm_dist::expert_outer")
def expert_outer(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """Of each expert the sum over its rows of left^T right: [S, X], [S, Y] -> [E, X, Y]."""
    if _multiplies_groups(left):
        if not _has_grouped_mm(left):
            return vlm_kernels.grouped_outer(left, right, counts)
        width, height = left.shape[1], right.shape[1]
        left, right = _aligned(left, 1), _aligned(right, 1)
        return _grouped_mm(left.T, right, counts.cumsum(0, dtype=torch.int32))[:, :width, :height].contiguous()
    found, start = left.new_zeros((len(counts), left.shape[1], right.shape[1])), 0
    for expert, number in enumerate(counts.tolist()):
        if number:
            torch.mm(left[start : start + number].T, right[start : start + number], out=found[expert])
            start += number
    return found


@expert_outer.register_fake
def _(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    return left.new_empty((len(counts), left.shape[1], right.shape[1]))


def _scales(statistics: Sequence[Tensor], packed: Sequence[int]) -> Tensor:
    """The scale of every block, in float32: [E, blocks of an expert]."""
    from bitsandbytes import functional

    absmax, _, offset, outer_absmax, outer_code = statistics
    scales = functional.dequantize_blockwise(absmax, absmax=outer_absmax, code=outer_code, blocksize=packed[4])
    return (scales + offset).view(packed[0], -1)


def _unpack_one(weight: Tensor, statistics: Any, packed: Any, dtype: torch.dtype, scales: Tensor, expert: int) -> Tensor:
    """The weight of one expert, [X, Y], in the buffer."""
    codes = weight.view(torch.uint8).view(packed[0], -1)[expert]
    return _dequantise(codes, scales[expert], statistics[1], packed[3], tuple(packed[1:3]), dtype)


def _unpack(weight: Tensor, statistics: Any, packed: Any, dtype: torch.dtype, hit: Tensor) -> Tensor:
    """The weights of the experts of `hit`, [len(hit), X, Y], in the buffer: one launch."""
    codes = weight.view(torch.uint8).view(packed[0], -1)[hit]
    return _dequantise(codes, _scales(statistics, packed)[hit], statistics[1], packed[3], (len(hit), *packed[1:3]), dtype)


def _dequantise(codes: Tensor, scales: Tensor, code: Tensor, blocksize: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    from bitsandbytes import functional

    state = functional.QuantState(
        absmax=scales.flatten(), shape=torch.Size(shape), code=code, blocksize=blocksize, quant_type="nf4", dtype=dtype
    )
    if codes.is_cuda:
        return vlm_kernels.nf4_dequantize(codes, state, out=_buffer(shape, codes.device, dtype))
    return functional.dequantize_4bit(codes.view(-1, 1), state).view(shape)


def _buffer(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    number = torch.Size(shape).numel()
    held = _BUFFERS.get((device, dtype))
    if held is None or held.numel() < number:
        _BUFFERS.pop((device, dtype), None)  # the old one goes before the new one comes
        held = _BUFFERS[device, dtype] = torch.empty(number, device=device, dtype=dtype)
    return held[:number].view(shape)


def _multiplies_groups(x: Tensor) -> bool:
    """Whether one launch multiplies the rows of all experts: by torch's grouped_mm, else by the kernel. Cards before Ampere loop, too."""
    return x.is_cuda and multiplies_tiles(x)


def _has_grouped_mm(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and hasattr(torch.nn.functional, "grouped_mm")


def _grouped_mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(left, right, offs=ends)


def _grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """x [S, I] by groups of rows times weights [G, I, O]."""
    width = weights.shape[-1]
    weights = _aligned(_aligned(weights, 1), 2)
    return _grouped_mm(_aligned(x, 1), weights, ends)[:, :width]


def _aligned(tensor: Tensor, dim: int) -> Tensor:
    """With zeros behind, so that this dimension holds a multiple of ALIGNED bytes: adapters of a small rank."""
    lacking = -tensor.shape[dim] % (ALIGNED // tensor.element_size())
    if not lacking:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, lacking))
