"""A gated MLP of three 4-bit linear layers with low-rank adapters, in one autograd function.

y = act(x Wg^T) * (x Wu^T);  z = y Wd^T        each product with its adapter and bias, as nf4_lora_linear

shapes    x [M, K], gate and up to [M, N] each, down back to [M, K]; r adapters' ranks
saved     what x can be made of again (a norm's input), or x; gate and up side by side [M, 2 N]; h of both inputs [M, r]; not y
bytes     gate's and up's weights lie above one another, so their products are one, forward and backward; y is made again by the
          launch that makes gate's and up's gradients
FLOPs     those of nf4_lora_linear and of the gate
backward  that of nf4_lora_group for down, then the gate's, then that of nf4_lora_group for gate and up

An N that is no multiple of 8 (Qwen2.5-VL's vision tower: 3,420) is filled up with zeros: where rows of 16-bit numbers do not begin at
multiples of 16 bytes, cuBLAS takes slower products, made for a smaller alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vlm_kernels.common import Source, source_of
from vlm_kernels.nf4_lora_group import Copies, Layer, Reading, biases_of, check_layers, given_back, side_by_side, stacked
from vlm_kernels.nf4_lora_linear import draw_seed

ALIGNED = 8
"""Elements of 16 bit in the 16 bytes that rows begin at."""


@dataclass
class _Spec:
    first: Reading
    """Of gate and up."""
    second: Reading
    """Of down."""
    gate: Callable
    gradients: Callable
    copies: Copies

    def halves(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate's and up's part [M, N] of what lies side by side."""
        gate, up = both.chunk(2, dim=1)
        N = self.first.layers[0].width
        return gate[:, :N], up[:, :N]

    def down_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[K, N], filled up."""
        W, below = self.second.dequantized(dtype), self.first.below
        if not below:
            return W
        wide = W.new_empty(len(W), W.shape[1] + below)
        wide[:, -below:].zero_()
        wide[:, :-below].copy_(W)
        return wide


class _GatedMlp(torch.autograd.Function):
    """Factors: A of gate, up, down; B of gate, up, down."""

    @staticmethod
    def forward(ctx, x, source: Source | None, spec: _Spec, *factors):
        first, second, N = spec.first, spec.second, spec.first.layers[0].width
        narrow, rows = spec.copies.of(factors, x.dtype), x.reshape(-1, x.shape[-1])
        both = torch.nn.functional.linear(rows, first.dequantized(x.dtype), biases_of(first.layers, x.dtype, first.below))
        h = first.down(rows, stacked(narrow[:2]))
        first.up(spec.halves(both), h, narrow[3:5])
        y = spec.gate(*both.chunk(2, dim=1))
        z = torch.nn.functional.linear(y.view(*x.shape[:-1], -1), spec.down_weight(x.dtype), biases_of(second.layers, x.dtype))
        h_down = second.down(y[:, :N], narrow[2])
        second.up((z.view(len(rows), -1),), h_down, narrow[5:])
        ctx.make, kept = source or (None, (x,))
        ctx.save_for_backward(both, h, h_down, *kept)
        ctx.spec, ctx.narrow, ctx.factors, ctx.shape = spec, narrow, factors, x.shape
        return z

    @staticmethod
    def backward(ctx, *grads):
        (dz,) = grads
        both, h, h_down, *kept = ctx.saved_tensors
        first = ctx.spec.first
        narrow, gradients = ctx.narrow, side_by_side(ctx.factors, both.dtype)
        d_both = _back_to_gate(ctx.spec, dz.reshape(len(h), -1).contiguous(), both, h_down, narrow, gradients)
        x = (ctx.make(*kept) if ctx.make else kept[0]).reshape(len(h), -1)
        sides = narrow[:2], narrow[3:5], gradients[:2], gradients[3:5]
        dx = first.backward(ctx.spec.halves(d_both), d_both, x, h, *sides, ctx.needs_input_grad[0])
        back = given_back(gradients, ctx.factors)
        dx = dx if dx is None else dx.view(ctx.shape)
        return dx, None, None, *(one if needed else None for one, needed in zip(back, ctx.needs_input_grad[3:], strict=True))


def _back_to_gate(
    spec: _Spec, dz: torch.Tensor, both: torch.Tensor, h: torch.Tensor, narrow: list[torch.Tensor], gradients: list[torch.Tensor]
) -> torch.Tensor:
    """Of the shape of `both`: the gradients of gate and up; writes those of down's adapter."""
    (layer,), N = spec.second.layers, spec.first.layers[0].width
    A, B, dA, dB = narrow[2], narrow[5], gradients[2], gradients[5]
    g = dz @ B
    dy = dz @ spec.down_weight(dz.dtype)
    spec.second.add_through(dy[:, :N], g, A, 0)
    dB.addmm_(dz.T, h, beta=0, alpha=layer.scale)
    d_both, y = spec.gradients(dy, *both.chunk(2, dim=1))
    spec.second.write_dA(dA, g, y[:, :N], 0)
    return d_both


def nf4_gated_mlp(
    x: torch.Tensor, layers: Sequence[Layer], gate: tuple[Callable, Callable], copies: Copies, *, dropout: float = 0.0
) -> torch.Tensor:  # fmt: skip
    """down(gate(gate_layer(x), up_layer(x))), in the dtype of x.

    Args:
        x: [..., K].
        layers: gate, up and down, each with one LoRA adapter.
        gate: a gate, and what gives its gradients and its result again: (swiglu, swiglu_gradients).
        copies: one for these layers, kept between calls.
        dropout: probability of dropping an element of an adapter's input, each layer's apart.

    Returns:
        z [..., K].

    Raises:
        ValueError: shapes do not fit.
    """
    check_layers("nf4_gated_mlp", x.shape[-1], layers[:2])
    check_layers("nf4_gated_mlp", layers[0].width, layers[2:])
    seeds = [draw_seed(dropout) for _ in layers]
    below = -layers[0].width % ALIGNED
    spec = _Spec(Reading(layers[:2], dropout, seeds[:2], below), Reading(layers[2:], dropout, seeds[2:]), *gate, copies)
    factors = [layer.A for layer in layers] + [layer.B for layer in layers]
    with torch.autocast(x.device.type, enabled=False):
        return _GatedMlp.apply(x, source_of(x), spec, *factors)
