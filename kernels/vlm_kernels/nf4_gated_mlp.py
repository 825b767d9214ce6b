"""A gated MLP of three 4-bit linear layers with low-rank adapters, in one autograd function.

y = act(x Wg^T) * (x Wu^T);  z = y Wd^T        each product with its adapter and bias, as nf4_lora_linear

shapes    x [M, K], gate and up to [M, N] each, down back to [M, K]; r adapters' ranks
saved     what x can be made of again (a norm's input), or x; gate and up side by side [M, 2 N]; h of both inputs [M, r]; not y
bytes     gate's and up's weights lie above one another, so their products are one, forward and backward, and each B beside its weight:
          [x, h] times all of it is gate and up, and their gradients times it are dx and G, so nothing of N is read or written for an
          adapter alone; in the same way [dz, G] times down's weight with its A below is dy. y is made again by the launch that makes
          gate's and up's gradients
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
from vlm_kernels.nf4_dequantize import nf4_dequantize
from vlm_kernels.nf4_lora_group import Copies, Layer, Reading, biases_of, check_layers, given_back, side_by_side, stacked
from vlm_kernels.nf4_lora_linear import adapted, draw_seed

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

    @property
    def width(self) -> int:
        """N."""
        return self.first.layers[0].width

    @property
    def below(self) -> int:
        """What fills N up."""
        return -self.width % ALIGNED

    def halves(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate's and up's part [M, N] of what lies side by side."""
        gate, up = both.chunk(2, dim=1)
        return gate[:, : self.width], up[:, : self.width]

    def narrow(self, factors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
        """A of gate, up and down and B of down; and [2 N, r], filled up: gate's B, and up's below and to the right of it."""
        *As, gate, up, down = factors
        scales = [layer.scale for layer in self.first.layers]
        copies = self.copies.of(As, [down], [self.second.layers[0].scale], dtype)
        width = _filled(sum(layer.rank for layer in self.first.layers))
        return copies, self.copies.diagonal([gate, up], scales, self.width + self.below, width)

    def first_weight(self, diagonal: torch.Tensor) -> torch.Tensor:
        """[2 N, K + r]: gate's above up's, filled up; beside each its B, zeros beside what is the other's."""
        K, height = self.first.layers[0].A.shape[1], self.width + self.below
        W = diagonal.new_empty(len(diagonal), K + diagonal.shape[1])
        for layer, part in zip(self.first.layers, W.split(height), strict=True):
            nf4_dequantize(layer.codes, layer.state, out=part[: self.width, :K])
        if self.below:
            W.view(2, height, -1)[:, self.width :].zero_()
        W[:, K:].copy_(diagonal)
        return W

    def second_weight(self, A: torch.Tensor, with_A: bool) -> torch.Tensor:
        """[K, N], filled up; [K + r, N] with A below it."""
        (layer,), N = self.second.layers, self.width
        K = layer.width
        if not with_A and not self.below:
            return nf4_dequantize(layer.codes, layer.state, A.dtype)
        W = A.new_empty(K + _filled(layer.rank) if with_A else K, N + self.below)
        if self.below:
            W[:, N:].zero_()
        nf4_dequantize(layer.codes, layer.state, out=W[:K, :N])
        if with_A:
            W[K : K + layer.rank, :N].copy_(A)
            if len(W) > K + layer.rank:
                W[K + layer.rank :].zero_()
        return W


def _filled(count: int) -> int:
    return count + -count % ALIGNED


def _beside(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """[x, h], filled up with zeros."""
    missing = -h.shape[1] % ALIGNED
    return torch.cat([x, h, *([h.new_zeros(len(h), missing)] if missing else [])], dim=1)


class _GatedMlp(torch.autograd.Function):
    """Factors: A of gate, up, down; B of gate, up, down."""

    @staticmethod
    def forward(ctx, x, source: Source | None, spec: _Spec, *factors):
        first, second, N = spec.first, spec.second, spec.width
        (narrow, diagonal), rows = spec.narrow(factors, x.dtype), x.reshape(-1, x.shape[-1])
        h = first.down(rows, stacked(narrow[:2]))
        both = torch.nn.functional.linear(_beside(rows, h), spec.first_weight(diagonal), biases_of(first.layers, x.dtype, spec.below))
        y = spec.gate(*both.chunk(2, dim=1))
        h_down = second.down(y[:, :N], narrow[2])
        z = adapted(y, spec.second_weight(narrow[2], with_A=False), biases_of(second.layers, x.dtype), h_down, narrow[3])
        ctx.make, kept = source or (None, (x,))
        ctx.save_for_backward(both, h, h_down, *kept)
        ctx.spec, ctx.narrow, ctx.diagonal, ctx.factors, ctx.shape = spec, narrow, diagonal, factors, x.shape
        return z.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, *grads):
        (dz,) = grads
        both, h, h_down, *kept = ctx.saved_tensors
        spec, narrow, gradients = ctx.spec, ctx.narrow, side_by_side(ctx.factors, both.dtype)
        d_both = _back_to_gate(spec, dz.reshape(len(h), -1), both, h_down, narrow, gradients)
        x = (ctx.make(*kept) if ctx.make else kept[0]).reshape(len(h), -1)
        dx = _back_to_input(spec, d_both, x, h, narrow, ctx.diagonal, gradients).view(ctx.shape)
        back = given_back(gradients, ctx.factors)
        return dx, None, None, *(one if needed else None for one, needed in zip(back, ctx.needs_input_grad[3:], strict=True))


def _back_to_gate(
    spec: _Spec, dz: torch.Tensor, both: torch.Tensor, h: torch.Tensor, narrow: list[torch.Tensor], gradients: list[torch.Tensor]
) -> torch.Tensor:
    """Of the shape of `both`: the gradients of gate and up; writes those of down's adapter."""
    second, N, A, B = spec.second, spec.width, narrow[2], narrow[3]
    G = second.back([dz], [B])
    if second.p:
        dy = dz @ spec.second_weight(A, with_A=False)
        dy[:, :N].add_(second.through(G, [A]))
    else:
        dy = _beside(dz, G) @ spec.second_weight(A, with_A=True)
    d_both, y = spec.gradients(dy, *both.chunk(2, dim=1))
    second.write([gradients[2]], [gradients[5]], [dz], G, y[:, :N], h)
    return d_both


def _back_to_input(
    spec: _Spec, d_both: torch.Tensor, x: torch.Tensor, h: torch.Tensor, narrow: list[torch.Tensor], diagonal: torch.Tensor,
    gradients: list[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """dx, whose rows lie apart; writes the gradients of gate's and up's adapters."""
    first, K = spec.first, x.shape[1]
    wide = d_both @ spec.first_weight(diagonal)  # [M, K + r]: dx but for what comes through the adapters, and G
    dx, G = wide[:, :K], wide[:, K : K + h.shape[1]]
    first.write(gradients[:2], gradients[3:5], spec.halves(d_both), G, x, h)
    return dx.add_(first.through(G, narrow[:2])) if first.p else dx.addmm_(G, stacked(narrow[:2]))


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
    spec = _Spec(Reading(layers[:2], dropout, seeds[:2]), Reading(layers[2:], dropout, seeds[2:]), *gate, copies)
    factors = [layer.A for layer in layers] + [layer.B for layer in layers]
    with torch.autocast(x.device.type, enabled=False):
        return _GatedMlp.apply(x, source_of(x), spec, *factors)
