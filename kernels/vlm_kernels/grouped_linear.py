"""Rows sorted by group, each times the weight of its group: the experts of a sparse layer.

    y_s = W_g x_s                            g: the group of row s
    dx_s = W_g^T dy_s,  dW_g = sum over the group's rows of dy_s x_s^T

shapes    x [S, K], W [G, N, K] (transposed: [G, K, N]), counts [G] that add up to S, y [S, N]
saved     x, only where W trains; W, only where x needs a gradient
bytes     e (S K + S N), and e N K for each group that has rows (e bytes an element); those of the others are not read
FLOPs     2 S N K forward; twice that backward, half of it where W is frozen

Which rows a program takes it finds by itself, from the counts: the host does not wait for them. So a few programs too many are started,
one for each group at the most, and these end at once. One launch for all groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from vlm_kernels import reference
from vlm_kernels.common import AMPERE, INTERPRETED, Compilation, runs_kernel, triton_type
from vlm_kernels.launch import launch
from vlm_kernels.operation import operation


@triton.jit
def _product(left, right, total, INTERPRETED_DOT: tl.constexpr):
    """total + left right."""
    if INTERPRETED_DOT:  # the interpreter multiplies bfloat16 as if it were integers
        return total + tl.dot(left.to(tl.float32), right.to(tl.float32))
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _linear_kernel(
    X, W, COUNTS, Y, G, N, K, x_stride, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr, INTERPRETED_DOT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one group, BLOCK_N columns of y."""
    across = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // across
    groups = tl.arange(0, BLOCK_G)
    counts = tl.load(COUNTS + groups, mask=groups < G, other=0).to(tl.int32)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    if tile >= tl.sum(tiles, axis=0):
        return
    group = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    begin = tl.sum(tl.where(groups < group, counts, 0), axis=0)
    end = begin + tl.sum(tl.where(groups == group, counts, 0), axis=0)
    its_first = tl.sum(tl.where(groups < group, tiles, 0), axis=0)
    rows = (begin + (tile - its_first) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    columns = (tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    W += group.to(tl.int64) * N * K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(X + rows * x_stride + k[None, :], mask=(rows < end) & (k[None, :] < K), other=0.0)
        if TRANSPOSED:
            inside = (k[:, None] < K) & (columns[None, :] < N)
            w = tl.load(W + k[:, None].to(tl.int64) * N + columns[None, :], mask=inside, other=0.0)
        else:
            inside = (columns[:, None] < N) & (k[None, :] < K)
            w = tl.trans(tl.load(W + columns[:, None] * K + k[None, :], mask=inside, other=0.0))
        total = _product(x, w, total, INTERPRETED_DOT)
    tl.store(Y + rows * N + columns[None, :], total.to(Y.dtype.element_ty), mask=(rows < end) & (columns[None, :] < N))


@triton.jit
def _outer_kernel(
    LEFT, RIGHT, COUNTS, Y, G, N, K, left_stride, right_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr, INTERPRETED_DOT: tl.constexpr,
):  # fmt: skip
    """BLOCK_N times BLOCK_K elements of one group's sum; a group without rows gets zeros."""
    down, across = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    group, place = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    groups = tl.arange(0, BLOCK_G)
    counts = tl.load(COUNTS + groups, mask=groups < G, other=0).to(tl.int32)
    begin = tl.sum(tl.where(groups < group, counts, 0), axis=0)
    end = begin + tl.sum(tl.where(groups == group, counts, 0), axis=0)
    n = (place // across * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = place % across * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(begin, end, BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        left = tl.load(LEFT + rows * left_stride + n[None, :], mask=(rows < end) & (n[None, :] < N), other=0.0)
        right = tl.load(RIGHT + rows * right_stride + k[None, :], mask=(rows < end) & (k[None, :] < K), other=0.0)
        total = _product(tl.trans(left), right, total, INTERPRETED_DOT)
    Y += group.to(tl.int64) * N * K
    tl.store(Y + n[:, None] * K + k[None, :], total.to(Y.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))


def _block(size: int, most: int) -> int:
    """tl.dot takes 16 and more."""
    return min(most, max(16, triton.next_power_of_2(size)))


def linear_blocks(S: int, G: int, N: int, K: int, itemsize: int) -> dict[str, int]:
    """Of `_linear_kernel`: few rows a group, or a small rank, get small tiles; so does float32, which has no tensor cores."""
    most_n, most_k = (128, 64) if itemsize == 2 else (64, 32)
    return {"BLOCK_M": _block(S // max(G, 1), 64), "BLOCK_N": _block(N, most_n), "BLOCK_K": _block(K, most_k),
            "BLOCK_G": triton.next_power_of_2(max(G, 1))}  # fmt: skip


def outer_blocks(G: int, N: int, K: int, itemsize: int) -> dict[str, int]:
    """Of `_outer_kernel`."""
    most_k = 128 if itemsize == 2 else 64
    return {"BLOCK_M": 32, "BLOCK_N": _block(N, 64), "BLOCK_K": _block(K, most_k), "BLOCK_G": triton.next_power_of_2(max(G, 1))}


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@operation("grouped_linear")
def _linear(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, transposed: bool) -> torch.Tensor:
    (S, K), G, N = x.shape, len(weight), weight.shape[2 if transposed else 1]
    x, weight = _in_rows(x), weight.contiguous()
    y = torch.empty((S, N), dtype=x.dtype, device=x.device)
    if y.numel():
        blocks = linear_blocks(S, G, N, K, x.itemsize)
        tiles = S // blocks["BLOCK_M"] + min(G, S)
        launch(
            _linear_kernel,
            (tiles * triton.cdiv(N, blocks["BLOCK_N"]),),
            x,
            weight,
            counts,
            y,
            G,
            N,
            K,
            x.stride(0),
            TRANSPOSED=transposed,
            **blocks,
            INTERPRETED_DOT=INTERPRETED,
        )
    return y


@_linear.register_fake
def _(x, weight, counts, transposed):
    return torch.empty((len(x), weight.shape[2 if transposed else 1]), dtype=x.dtype, device=x.device)


@operation("grouped_outer")
def _outer(left: torch.Tensor, right: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    G, N, K = len(counts), left.shape[1], right.shape[1]
    left, right = _in_rows(left), _in_rows(right)
    y = torch.empty((G, N, K), dtype=left.dtype, device=left.device)
    if y.numel():
        blocks = outer_blocks(G, N, K, left.itemsize)
        programs = G * triton.cdiv(N, blocks["BLOCK_N"]) * triton.cdiv(K, blocks["BLOCK_K"])
        launch(
            _outer_kernel, (programs,),
            left, right, counts, y, G, N, K, left.stride(0), right.stride(0), **blocks, INTERPRETED_DOT=INTERPRETED
        )  # fmt: skip
    return y


@_outer.register_fake
def _(left, right, counts):
    return torch.empty((len(counts), left.shape[1], right.shape[1]), dtype=left.dtype, device=left.device)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, counts, ctx.transposed = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, counts)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, counts = ctx.saved_tensors
    dx = _linear(dy, weight, counts, not ctx.transposed) if weight is not None else None
    if x is None:
        return dx, None, None, None
    return dx, _outer(x, dy, counts) if ctx.transposed else _outer(dy, x, counts), None, None


_linear.register_autograd(_backward, setup_context=_setup)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """Each row times the weight of its group.

    Args:
        x: [S, K], sorted by group.
        weight: [G, N, K], or [G, K, N] with `transposed`, of the dtype of x.
        counts: [G] integers, how many rows each group has; they add up to S, which is not looked at.

    Returns:
        y: [S, N].

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if weight.ndim != 3 or x.shape[1:] != weight.shape[1 if transposed else 2 :][:1] or counts.shape != weight.shape[:1]:
        raise ValueError(f"grouped_linear: x {tuple(x.shape)}, counts {tuple(counts.shape)} must fit weights of {tuple(weight.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"grouped_linear: x is {x.dtype}, its weights are {weight.dtype}; give both in one")
    return (_linear if runs_kernel(x) else reference.grouped_linear)(x, weight, counts, transposed)


def grouped_outer(left: torch.Tensor, right: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Of each group the sum over its rows of left^T right, which is the gradient of a weight; it has none of its own on a GPU.

    Args:
        left, right: [S, N], [S, K], sorted by group, of one dtype.
        counts: [G] integers, how many rows each group has.

    Returns:
        [G, N, K]; zeros for a group without rows.

    Raises:
        ValueError: not as many rows on the left as on the right, or of other dtypes.
    """
    if len(left) != len(right) or left.dtype != right.dtype:
        found = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (left, right)]
        raise ValueError(f"grouped_outer: {found[0]} and {found[1]} must be as many rows of one dtype")
    return (_outer if runs_kernel(left) else reference.grouped_outer)(left, right, counts)


def compilations() -> Iterator[Compilation]:
    """Experts of Qwen3-VL-30B-A3B for 2,048 tokens and for one, and adapters of rank 16 on them."""
    S, G = 16384, 128
    for rows, N, K, dtype, forms in (
        (S, 1536, 2048, torch.bfloat16, "linear transposed outer"), (S, 2048, 768, torch.bfloat16, "linear transposed outer"),
        (S, 1536, 2048, torch.float32, "linear transposed outer"), (8, 1536, 2048, torch.bfloat16, "linear"),
        (S, 16, 2048, torch.bfloat16, "linear outer"), (S, 2048, 16, torch.bfloat16, "transposed"),
    ):  # fmt: skip
        kind, shape = triton_type(dtype), f"{rows} rows, {G} of {K} to {N}" + (", float32" if dtype == torch.float32 else "")
        sizes = {"COUNTS": "*i64", "Y": kind, "G": "i32", "N": "i32", "K": "i32"}
        for form in forms.split():
            if form == "outer":
                pointers = {"LEFT": kind, "RIGHT": kind, **sizes, "left_stride": "i32", "right_stride": "i32"}
                constants = {**outer_blocks(G, N, K, dtype.itemsize), "INTERPRETED_DOT": False}
                yield Compilation(_outer_kernel, shape, pointers, constants, least=AMPERE)
                continue
            blocks = linear_blocks(rows, G, N, K, dtype.itemsize)
            constants = {"TRANSPOSED": form == "transposed", **blocks, "INTERPRETED_DOT": False}
            yield Compilation(_linear_kernel, shape, {"X": kind, "W": kind, **sizes, "x_stride": "i32"}, constants, least=AMPERE)
