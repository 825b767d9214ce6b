"""LayerNorm (Ba et al. 2016, arXiv:1607.06450), for vision towers.

y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

shapes    x, y [..., N]; weight, bias [N]
saved     x, mean [M] and rstd [M] float32 (M rows)
bytes     forward: read x, write y: 2 e M N; backward: read x and dy, write dx: 3 e M N (e bytes an element)
FLOPs     about 7 M N forward, 12 M N backward
backward  dx = rstd * (g - mean(g) - xhat * mean(g * xhat))   with g = dy * weight, xhat = (x - mean) * rstd
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from vlm_kernels import reference
from vlm_kernels.common import Compilation, as_rows, programs_for, row_block, runs_kernel, triton_type
from vlm_kernels.launch import launch
from vlm_kernels.operation import operation


@triton.jit
def _forward_kernel(X, W, B, Y, MEAN, RSTD, x_stride, N, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / N
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / N + eps)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)
    weight = tl.load(W + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(B + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * N + columns, (centred * rstd * weight + bias).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(DY, X, W, MEAN, RSTD, DX, DW, DB, M, x_stride, N, WITH_DW: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    weight = tl.load(W + columns, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    db = tl.zeros((BLOCK,), dtype=tl.float32)
    row = program.to(tl.int64)
    while row < M:
        dy = tl.load(DY + row * N + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row)
        xhat = tl.where(inside, (x - tl.load(MEAN + row)) * rstd, 0.0)
        g = dy * weight
        dx = rstd * (g - tl.sum(g, axis=0) / N - xhat * (tl.sum(g * xhat, axis=0) / N))
        tl.store(DX + row * N + columns, dx.to(DX.dtype.element_ty), mask=inside)
        if WITH_DW:
            dw += dy * xhat
            db += dy
        row += tl.num_programs(0)
    if WITH_DW:
        tl.store(DW + program.to(tl.int64) * N + columns, dw, mask=inside)
        tl.store(DB + program.to(tl.int64) * N + columns, db, mask=inside)


@operation("layer_norm")
def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = as_rows(x)
    M, N = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        block, warps = row_block(N)
        launch(_forward_kernel, (M,), rows, weight, bias, y, mean, rstd, rows.stride(0), N, eps, BLOCK=block, num_warps=warps)
    return y, mean, rstd


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    rows = x.numel() // max(x.shape[-1], 1)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


@operation("layer_norm_backward")
def _layer_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, with_dw: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dw, db); the last two have no element unless asked for."""
    rows, dy = as_rows(x), dy.contiguous()
    M, N = rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = programs_for(M, x.device) if with_dw else max(M, 1)
    partial = torch.zeros((2, programs, N) if with_dw else (2, 0, N), dtype=torch.float32, device=x.device)
    if x.numel():
        block, warps = row_block(N)
        launch(
            _backward_kernel,
            (programs,),
            dy,
            rows,
            weight,
            mean,
            rstd,
            dx,
            partial[0],
            partial[1],
            M,
            rows.stride(0),
            N,
            WITH_DW=with_dw,
            BLOCK=block,
            num_warps=warps,
        )
    if not with_dw:
        return dx, weight.new_empty(0), weight.new_empty(0)
    dw, db = partial.sum(1).to(weight.dtype)
    return dx, dw.clone(), db.clone()


@_layer_norm_backward.register_fake
def _(dy, x, weight, mean, rstd, with_dw):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, *(weight.new_empty(weight.shape if with_dw else (0,)) for _ in range(2))


def _setup(ctx, inputs, output):
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, dy, *_):
    with_dw = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dw, db = _layer_norm_backward(dy, *ctx.saved_tensors, with_dw)
    return dx, dw if ctx.needs_input_grad[1] else None, db if ctx.needs_input_grad[2] else None, None


_layer_norm.register_autograd(_backward, setup_context=_setup)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: [..., N], float32, bfloat16 or float16.
        weight, bias: [N].

    Returns:
        y, of shape and dtype of x.

    Raises:
        ValueError: shapes do not fit.
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"layer_norm: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} for rows of {x.shape[-1]} elements")
    if not runs_kernel(x):
        return reference.layer_norm(x, weight, bias, eps)
    return _layer_norm(x, weight, bias, eps)[0]


def compilations() -> Iterator[Compilation]:
    """Forward and backward at the widths of real vision towers."""
    bf16 = triton_type(torch.bfloat16)
    for width in (1024, 1152, 1280, 1664):
        block, warps = row_block(width)
        pointers = {"X": bf16, "W": bf16, "B": bf16, "Y": bf16, "MEAN": "*fp32", "RSTD": "*fp32", "x_stride": "i32", "N": "i32",
                    "eps": "fp32"}  # fmt: skip
        yield Compilation(_forward_kernel, f"width {width}", pointers, {"BLOCK": block}, warps)
        pointers = {"DY": bf16, "X": bf16, "W": bf16, "MEAN": "*fp32", "RSTD": "*fp32", "DX": bf16, "DW": "*fp32", "DB": "*fp32",
                    "M": "i32", "x_stride": "i32", "N": "i32"}  # fmt: skip
        for with_dw in (False, True):
            yield Compilation(_backward_kernel, f"width {width}", pointers, {"WITH_DW": with_dw, "BLOCK": block}, warps)
