"""A linear layer whose weight is held in 4 bit, with a low-rank adapter (QLoRA, arXiv:2305.14314).

    y = x W^T + b + s * (m x) A^T B^T        m: dropout, 0 or 1 / (1 - p)

    shapes    x [M, K], W [N, K] in 4 bit, b [N], A [r, K], B [N, r], y [M, N]
    saved     x itself and h = (m x) A^T [M, r]; no dequantised W, no dropped-out copy of x, no mask: both are made again
    bytes     W: 0.516 N K read, and written and read once in 16 bit where the batch is large; x and y once: e M (K + N)
    FLOPs     2 M N K + 2 M r (K + N) forward; twice that backward with dx, without dW
    backward  g = s dy B;  dx = dy W + m (g A),  dA = g^T (m x),  dB = s dy^T h

A large batch dequantises W to a buffer and multiplies by cuBLAS. Up to SMALL rows (generation) go through bitsandbytes' product on a card:
W is then read in 4 bit and never written. (A kernel of our own for it took three to nine times as long on an H200:
docs/benchmarks/gpu/h200/pieces.json.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from vlm_kernels.common import Compilation, is_counted, runs_kernel, triton_type
from vlm_kernels.launch import launch
from vlm_kernels.nf4_dequantize import nf4_dequantize

SMALL = 16
"""Rows up to which W is read in 4 bit: one tile of the tensor cores."""


@triton.jit
def _dropout_kernel(X, Y, seed, n, p, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + place, mask=place < n, other=0.0).to(tl.float32)
    kept = tl.rand(seed, place) >= p
    tl.store(Y + place, tl.where(kept, x / (1.0 - p), 0.0).to(Y.dtype.element_ty), mask=place < n)


def dropped(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """x with dropout; the same seed drops the same elements."""
    if p == 0.0:
        return x
    if not runs_kernel(x):
        kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) >= p
        return x * kept.to(x.dtype).div_(1 - p)
    x = x.contiguous()
    y = torch.empty_like(x)
    if is_counted(x):
        return y
    launch(_dropout_kernel, (triton.cdiv(x.numel(), 1024),), x, y, seed, x.numel(), p, BLOCK=1024)
    return y


def adapted(x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None, h: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """x W^T + b + h B^T [M, N]. The adapter's part is written first: the product with W reads it while it computes."""
    y = h @ B.T if bias is None else torch.addmm(bias, h, B.T)
    return y.addmm_(x, W.T)


class _NF4LoraLinear(torch.autograd.Function):
    """Saves x, the 4-bit weight as it is, and h."""

    @staticmethod
    def forward(ctx, x, codes, state, bias, A, B, scale, p, seed):
        h = None if A is None else dropped(x, p, seed) @ A.to(x.dtype).T
        y = _sum(x, codes, state, None if bias is None else bias.to(x.dtype), h, None if B is None else (B * scale).to(x.dtype))
        ctx.save_for_backward(x if A is not None else None, codes, A, B, h)
        ctx.state, ctx.scale, ctx.p, ctx.seed = state, scale, p, seed
        return y

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        x, codes, A, B, h = ctx.saved_tensors
        needs_x, needs_bias, needs_A, needs_B = (ctx.needs_input_grad[i] for i in (0, 3, 4, 5))
        dx = dA = dB = None
        if A is not None:
            g = dy @ (B * ctx.scale).to(dy.dtype)
            dx = dropped(g @ A.to(dy.dtype), ctx.p, ctx.seed) if needs_x else None
            dA = (g.T @ dropped(x, ctx.p, ctx.seed)).to(A.dtype) if needs_A else None
            dB = ((dy.T @ h) * ctx.scale).to(B.dtype) if needs_B else None
        if needs_x:
            W = nf4_dequantize(codes, ctx.state, dy.dtype)
            dx = dy @ W if dx is None else dx.addmm_(dy, W)
        return dx, None, None, dy.sum(0) if needs_bias else None, dA, dB, None, None, None


def _sum(
    x: torch.Tensor, codes: torch.Tensor, state: Any, bias: torch.Tensor | None, h: torch.Tensor | None, B: torch.Tensor | None
) -> torch.Tensor:
    """x W^T, with bias and adapter where there are."""
    if x.is_cuda and 0 < len(x) <= SMALL and not is_counted(x):
        from bitsandbytes import matmul_4bit

        y = matmul_4bit(x.detach(), codes, state)
        y = y if bias is None else y + bias
        return y if h is None or B is None else y.addmm_(h, B.T)
    W = nf4_dequantize(codes, state, x.dtype)
    return torch.nn.functional.linear(x, W, bias) if h is None or B is None else adapted(x, W, bias, h, B)


def nf4_lora_linear(
    x: torch.Tensor, codes: torch.Tensor, state: Any, bias: torch.Tensor | None = None, *,
    adapters: tuple[tuple[torch.Tensor, torch.Tensor, float], ...] = (), dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """A 4-bit linear layer with any number of LoRA adapters, in the dtype of x.

    Args:
        x: [..., K].
        codes: the packed weight of a bitsandbytes `Linear4bit`, stored in any dtype.
        state: its `QuantState`, of shape (N, K).
        bias: [N].
        adapters: (A [r, K], B [N, r], scale) of each active adapter; none: the base alone.
        dropout: probability of dropping an element of the adapters' input.

    Returns:
        y: [..., N].

    Raises:
        ValueError: shapes do not fit.
    """
    N, K = state.shape
    if x.shape[-1] != K or any(A.shape[1] != K or B.shape[0] != N for A, B, _ in adapters):
        raise ValueError(f"nf4_lora_linear: x {tuple(x.shape)} and adapters must fit a weight of shape {(N, K)}")
    rows = x.reshape(-1, K)
    first, *others = adapters or ((None, None, 0.0),)
    with torch.autocast(x.device.type, enabled=False):
        y = _NF4LoraLinear.apply(rows, codes, state, bias, *first, dropout, draw_seed(dropout))
        for A, B, scale in others:
            y = y + (torch.nn.functional.dropout(rows, dropout) @ A.to(x.dtype).T) @ B.to(x.dtype).T * scale
    return y.view(*x.shape[:-1], N)


def draw_seed(dropout: float) -> int:
    """From torch's own generator on the CPU: gradient checkpointing puts that back, and so draws the same again."""
    return int(torch.randint(2**31 - 1, ())) if dropout else 0


def compilations() -> Iterator[Compilation]:
    """Dropout."""
    bf16 = triton_type(torch.bfloat16)
    pointers = {"X": bf16, "Y": bf16, "seed": "i32", "n": "i64", "p": "fp32"}
    yield Compilation(_dropout_kernel, "any input", pointers, {"BLOCK": 1024})
