"""4-bit linear layers with low-rank adapters that read the same input, in one autograd function: Q, K and V; gate and up.

    y_i = x W_i^T + b_i + s_i * (m_i x) A_i^T B_i^T        as nf4_lora_linear, for each i

    shapes    x [M, K], W_i [N_i, K] in 4 bit, A_i [r_i, K], B_i [N_i, r_i]; N, r: the sums
    saved     what x can be made of again (a norm's input), or x; and h = [(m_i x) A_i^T] [M, r]
    bytes     each W_i once to 16 bit, side by side in one buffer for the backward pass: one product there, and no sum of dx; the
              adapter's part is written first, and the product with W_i, which has time to, adds to it
    FLOPs     those of nf4_lora_linear
    backward  G = [s_i dy_i B_i];  dx = G A + [dy_i] W,  dA = G^T x,  dB_i = s_i dy_i^T h_i

Adapters are copied to the number type of x, the B's times their s, in one launch a call or two; their gradients back in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vlm_kernels.common import Source, source_of
from vlm_kernels.nf4_dequantize import nf4_dequantize
from vlm_kernels.nf4_lora_linear import adapted, draw_seed, dropped


class Layer(NamedTuple):
    """One of them."""

    codes: torch.Tensor
    """Packed weight of a bitsandbytes `Linear4bit`."""
    state: Any
    """Its `QuantState`, of shape (N, K)."""
    bias: torch.Tensor | None
    """[N], frozen."""
    A: torch.Tensor
    """[r, K]."""
    B: torch.Tensor
    """[N, r]."""
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def width(self) -> int:
        return self.B.shape[0]


class Copies:
    """Adapters in the number type of a computation, written anew at each call."""

    def __init__(self) -> None:
        self._key: Any = None
        self._views: list[torch.Tensor] = []
        self._diagonal: torch.Tensor | None = None

    def of(self, As: Sequence[torch.Tensor], Bs: Sequence[torch.Tensor], scales: Sequence[float], dtype: torch.dtype) -> list[torch.Tensor]:
        """The A's behind one another, then each B times its layer's scale."""
        factors = [*As, *Bs]
        key = (tuple(factor.shape for factor in factors), dtype, factors[0].device)
        if key != self._key:
            self._key, self._views, self._diagonal = key, side_by_side(factors, dtype), None
        if any(scale != 1 for scale in scales):
            factors[len(As) :] = torch._foreach_mul(list(Bs), list(scales))
        torch._foreach_copy_(self._views, factors)
        return self._views

    def diagonal(self, Bs: Sequence[torch.Tensor], scales: Sequence[float], height: int, width: int) -> torch.Tensor:
        """Call `of` before. [height * B's, width]: each B times its layer's scale in rows and columns of its own, the next below and to
        the right of it; zeros elsewhere."""
        if self._diagonal is None:
            self._diagonal = self._views[0].new_zeros(height * len(Bs), width)
        at = 0
        for part, B, scale in zip(self._diagonal.split(height), Bs, scales, strict=True):
            torch.mul(B, scale, out=part[: len(B), at : at + B.shape[1]])
            at += B.shape[1]
        return self._diagonal


def side_by_side(like: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Room for tensors of these shapes in one piece of memory."""
    sizes = [tensor.numel() for tensor in like]
    flat = torch.empty(sum(sizes), dtype=dtype, device=like[0].device)
    return [part.view(tensor.shape) for part, tensor in zip(flat.split(sizes), like, strict=True)]


def stacked(views: Sequence[torch.Tensor]) -> torch.Tensor:
    """Neighbours of `side_by_side` with equal rows [n_i, K], as one [n, K]."""
    first = views[0]
    return first.as_strided((sum(len(view) for view in views), first.shape[1]), first.stride())


def given_back(gradients: list[torch.Tensor], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Neighbours of `side_by_side` in the number type of the factors, by one copy."""
    dtype = factors[0].dtype
    if gradients[0].dtype == dtype:
        return gradients
    sizes = [gradient.numel() for gradient in gradients]
    wide = gradients[0].as_strided((sum(sizes),), (1,)).to(dtype)
    return [part.view(factor.shape) for part, factor in zip(wide.split(sizes), factors, strict=True)]


@dataclass
class Reading:
    """What layers make of one input. Each B comes times its layer's scale (`Copies`)."""

    layers: Sequence[Layer]
    p: float
    seeds: Sequence[int]

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, K]: their weights above one another."""
        if len(self.layers) == 1:
            return nf4_dequantize(self.layers[0].codes, self.layers[0].state, dtype)
        heights = [layer.width for layer in self.layers]
        W = torch.empty((sum(heights), self.layers[0].A.shape[1]), dtype=dtype, device=self.layers[0].state.absmax.device)
        for layer, part in zip(self.layers, W.split(heights), strict=True):
            nf4_dequantize(layer.codes, layer.state, out=part)
        return W

    def down(self, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """h [M, r]."""
        if not self.p:
            return x @ A.T
        parts = A.split([layer.rank for layer in self.layers])
        return torch.cat([dropped(x, self.p, seed) @ part.T for seed, part in zip(self.seeds, parts, strict=True)], dim=1)

    def back(self, dys: Sequence[torch.Tensor], Bs: Sequence[torch.Tensor]) -> torch.Tensor:
        """G [M, r]."""
        G = Bs[0].new_empty(len(dys[0]), sum(layer.rank for layer in self.layers))
        for dy, B, g in zip(dys, Bs, self.by_rank(G), strict=True):
            torch.mm(dy, B, out=g)
        return G

    def through(self, G: torch.Tensor, As: Sequence[torch.Tensor]) -> torch.Tensor:
        """[M, K]: what comes to x through the adapters."""
        if not self.p:
            return G @ stacked(As)
        first, *others = (dropped(g @ A, self.p, seed) for g, A, seed in zip(self.by_rank(G), As, self.seeds, strict=True))
        for other in others:
            first += other
        return first

    def write(
        self, dAs: Sequence[torch.Tensor], dBs: Sequence[torch.Tensor], dys: Sequence[torch.Tensor], G: torch.Tensor, x: torch.Tensor,
        h: torch.Tensor,
    ) -> None:  # fmt: skip
        """The adapters' gradients."""
        for layer, dy, part, dB in zip(self.layers, dys, self.by_rank(h), dBs, strict=True):
            dB.addmm_(dy.T, part, beta=0, alpha=layer.scale)
        if not self.p:
            stacked(dAs).addmm_(G.T, x, beta=0)
            return
        for g, dA, seed in zip(self.by_rank(G), dAs, self.seeds, strict=True):
            dA.addmm_(g.T, dropped(x, self.p, seed), beta=0)

    def by_rank(self, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return h.split([layer.rank for layer in self.layers], dim=1)


def biases_of(layers: Sequence[Layer], dtype: torch.dtype, below: int = 0) -> torch.Tensor | None:
    """[N], if they have any; with so many zeros behind each."""
    if all(layer.bias is None for layer in layers):
        return None
    parts = [layer.A.new_zeros(layer.width, dtype=dtype) if layer.bias is None else layer.bias.to(dtype) for layer in layers]
    if below:
        nothing = parts[0].new_zeros(below)
        parts = [piece for part in parts for piece in (part, nothing)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, source: Source | None, reading: Reading, copies: Copies, *factors):
        count, rows = len(reading.layers), x.reshape(-1, x.shape[-1])
        narrow = copies.of(factors[:count], factors[count:], [layer.scale for layer in reading.layers], x.dtype)
        h = reading.down(rows, stacked(narrow[:count]))
        ys = []
        for layer, part, B in zip(reading.layers, reading.by_rank(h), narrow[count:], strict=True):
            W = nf4_dequantize(layer.codes, layer.state, x.dtype)
            ys.append(adapted(rows, W, biases_of([layer], x.dtype), part, B).view(*x.shape[:-1], -1))
        ctx.make, kept = source or (None, (x,))
        ctx.save_for_backward(h, *kept)
        ctx.reading, ctx.narrow, ctx.factors, ctx.shape = reading, narrow, factors, x.shape
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        h, *kept = ctx.saved_tensors
        reading, count = ctx.reading, len(ctx.reading.layers)
        gradients = side_by_side(ctx.factors, h.dtype)
        x = (ctx.make(*kept) if ctx.make else kept[0]).reshape(len(h), -1)
        dys = [dy.reshape(len(h), -1) for dy in dys]
        G, dx = reading.back(dys, ctx.narrow[count:]), None
        reading.write(gradients[:count], gradients[count:], dys, G, x, h)
        if ctx.needs_input_grad[0]:
            dx = reading.through(G, ctx.narrow[:count])
            dx.addmm_(torch.cat(dys, dim=1) if count > 1 else dys[0], reading.dequantized(h.dtype))
            dx = dx.view(ctx.shape)
        back = given_back(gradients, ctx.factors)
        return dx, None, None, None, *(one if needed else None for one, needed in zip(back, ctx.needs_input_grad[4:], strict=True))


def nf4_lora_group(x: torch.Tensor, layers: Sequence[Layer], copies: Copies, *, dropout: float = 0.0) -> tuple[torch.Tensor, ...]:
    """4-bit linear layers that read the same input, each with one LoRA adapter, in the dtype of x.

    Args:
        x: [..., K].
        copies: one for these layers, kept between calls.
        dropout: probability of dropping an element of an adapter's input, each layer's apart.

    Returns:
        y_i [..., N_i] of each.

    Raises:
        ValueError: shapes do not fit.
    """
    check_layers("nf4_lora_group", x.shape[-1], layers)
    reading = Reading(layers, dropout, [draw_seed(dropout) for _ in layers])
    factors = [layer.A for layer in layers] + [layer.B for layer in layers]
    with torch.autocast(x.device.type, enabled=False):
        return _Group.apply(x, source_of(x), reading, copies, *factors)


def check_layers(name: str, width: int, layers: Sequence[Layer]) -> None:
    """
    Raises:
        ValueError: their shapes do not fit an input of this width.
    """
    if any(tuple(layer.state.shape) != (layer.width, width) or layer.A.shape != (layer.B.shape[1], width) for layer in layers):
        raise ValueError(f"{name}: adapters and weights {[tuple(layer.state.shape) for layer in layers]} must fit x [..., {width}]")
