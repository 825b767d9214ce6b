"""A linear layer whose weight is held in 4 bit, with a low-rank adapter (QLoRA, arXiv:2305.14314).

    y = x W^T + b + s * (m x) A^T B^T        m: dropout, 0 or 1 / (1 - p)

    shapes    x [M, K], W [N, K] in 4 bit, b [N], A [r, K], B [N, r], y [M, N]
    saved     x itself and h = (m x) A^T [M, r]; no dequantised W, no dropped-out copy of x, no mask: both are made again
    bytes     W: 0.516 N K read, and written and read once in 16 bit where the batch is large; x and y once: e M (K + N)
    FLOPs     2 M N K + 2 M r (K + N) forward; twice that backward with dx, without dW
    backward  g = s dy B;  dx = dy W + m (g A),  dA = g^T (m x),  dB = s dy^T h

A large batch dequantises W to a buffer and multiplies by cuBLAS; up to SMALL rows (generation) go through one kernel that dequantises
tile by tile: W is then read in 4 bit and never written. Cards before Ampere (compute capability 8.0) take the first way for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from vlm_kernels.common import AMPERE, INTERPRETED, Compilation, is_counted, multiplies_tiles, runs_kernel, triton_type
from vlm_kernels.nf4_dequantize import block_scale, nf4_dequantize

SMALL = 16
"""Rows up to which the fused kernel runs: one tile of the tensor cores."""
TILE = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}


@triton.jit
def _small_batch_kernel(
    X, CODES, ABSMAX, TABLE, SCALE_TABLE, OUTER, OFFSET, Y, M, N, K, x_stride, BLOCKSIZE: tl.constexpr, OUTER_BLOCK: tl.constexpr,
    NESTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRETED_DOT: tl.constexpr,
):  # fmt: skip
    """y = x W^T for up to BLOCK_M rows: each program makes BLOCK_N columns of y."""
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    offset = tl.load(OFFSET)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = tl.load(X + rows[:, None] * x_stride + columns[None, :], mask=(rows[:, None] < M) & (columns[None, :] < K), other=0.0)
        pair_column = start // 2 + tl.arange(0, BLOCK_K // 2)
        inside = (outputs[:, None] < N) & (pair_column[None, :] < K // 2)
        pair = tl.load(CODES + outputs[:, None].to(tl.int64) * (K // 2) + pair_column[None, :], mask=inside, other=0).to(tl.int32)
        values = tl.interleave(tl.load(TABLE + (pair >> 4)), tl.load(TABLE + (pair & 15)))
        block = start // BLOCKSIZE + tl.arange(0, BLOCK_K // BLOCKSIZE)
        inside = (outputs[:, None] < N) & (block[None, :] < K // BLOCKSIZE)
        block = outputs[:, None].to(tl.int64) * (K // BLOCKSIZE) + block[None, :]
        scale = block_scale(ABSMAX, SCALE_TABLE, OUTER, offset, block, inside, OUTER_BLOCK, NESTED)
        tile = tl.reshape(values, (BLOCK_N, BLOCK_K // BLOCKSIZE, BLOCKSIZE)) * scale[:, :, None]
        w = tl.reshape(tile, (BLOCK_N, BLOCK_K)).to(x.dtype)
        if INTERPRETED_DOT:  # the interpreter multiplies bfloat16 as if it were integers
            total += tl.dot(x.to(tl.float32), tl.trans(w).to(tl.float32))
        else:
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    inside = (rows[:, None] < M) & (outputs[None, :] < N)
    tl.store(Y + rows[:, None] * N + outputs[None, :], total.to(Y.dtype.element_ty), mask=inside)


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
    _dropout_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, seed, x.numel(), p, BLOCK=1024)
    return y


class _NF4LoraLinear(torch.autograd.Function):
    """Saves x, the 4-bit weight as it is, and h."""

    @staticmethod
    def forward(ctx, x, codes, state, bias, A, B, scale, p, seed):
        y = _base(x, codes, state)
        if bias is not None:
            y += bias.to(y.dtype)
        h = None
        if A is not None:
            h = dropped(x, p, seed) @ A.to(x.dtype).T
            y.addmm_(h, B.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x if A is not None else None, codes, A, B, h)
        ctx.state, ctx.scale, ctx.p, ctx.seed = state, scale, p, seed
        return y

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        x, codes, A, B, h = ctx.saved_tensors
        needs_x, needs_bias, needs_A, needs_B = (ctx.needs_input_grad[i] for i in (0, 3, 4, 5))
        dx = dA = dB = None
        if needs_x:
            dx = dy @ nf4_dequantize(codes, ctx.state, dy.dtype)
        if A is not None:
            g = (dy @ B.to(dy.dtype)) * ctx.scale
            if dx is not None:
                dx += dropped(g @ A.to(dy.dtype), ctx.p, ctx.seed)
            dA = (g.T @ dropped(x, ctx.p, ctx.seed)).to(A.dtype) if needs_A else None
            dB = ((dy.T @ h) * ctx.scale).to(B.dtype) if needs_B else None
        return dx, None, None, dy.sum(0) if needs_bias else None, dA, dB, None, None, None


def _base(x: torch.Tensor, codes: torch.Tensor, state: Any) -> torch.Tensor:
    """x W^T."""
    N, K = state.shape
    fits = x.numel() > 0 and len(x) <= SMALL and K % state.blocksize == 0 and state.blocksize <= TILE["BLOCK_K"]
    if not fits or not runs_kernel(x) or is_counted(x) or not multiplies_tiles(x):
        return torch.nn.functional.linear(x, nf4_dequantize(codes, state, x.dtype))
    nested = state.state2 if state.nested else None
    more = (nested.code, nested.absmax, state.offset) if nested is not None else (state.code, state.code, state.code)
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty((len(x), N), dtype=x.dtype, device=x.device)
    packed = codes.contiguous().view(torch.uint8).flatten()
    _small_batch_kernel[(triton.cdiv(N, TILE["BLOCK_N"]),)](
        x, packed, state.absmax, state.code, *more, y, len(x), N, K, x.stride(0), BLOCKSIZE=state.blocksize,
        OUTER_BLOCK=nested.blocksize if nested is not None else 1, NESTED=nested is not None, **TILE, INTERPRETED_DOT=INTERPRETED,
        enable_fp_fusion=False,
    )  # fmt: skip
    return y


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
    """The small-batch kernel at real layers, and dropout."""
    bf16 = triton_type(torch.bfloat16)
    for N, K in ((4096, 4096), (18944, 3584), (3584, 18944), (28672, 8192)):
        for nested in (True, False):
            pointers = {"X": bf16, "CODES": "*u8", "ABSMAX": "*u8" if nested else "*fp32", "TABLE": "*fp32",
                        "SCALE_TABLE": "*fp32", "OUTER": "*fp32", "OFFSET": "*fp32", "Y": bf16, "M": "i32", "N": "i32",
                        "K": "i32", "x_stride": "i32"}  # fmt: skip
            constants = {"BLOCKSIZE": 64, "OUTER_BLOCK": 256, "NESTED": nested, **TILE, "INTERPRETED_DOT": False}
            options = {"enable_fp_fusion": False}
            yield Compilation(_small_batch_kernel, f"{K} to {N}", pointers, constants, options=options, least=AMPERE)
    pointers = {"X": bf16, "Y": bf16, "seed": "i32", "n": "i64", "p": "fp32"}
    yield Compilation(_dropout_kernel, "any input", pointers, {"BLOCK": 1024})
