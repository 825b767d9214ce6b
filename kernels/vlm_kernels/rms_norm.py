"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), with the residual sum before it in the same pass.

    s = x + residual            (in the dtype of x; without a residual s = x)
    y = s / sqrt(mean(s^2) + eps) * (offset + weight)

Llama: offset 0, rounded to the dtype of x before the product. Gemma 3, Qwen3.5: offset 1, the product in float32. Gemma 4: offset 0,
the product in float32.

    shapes    x, residual, y, s [..., N]; weight [N]
    saved     s and rstd [M] float32 (M rows)
    bytes     forward: read x (and residual), write y (and s); backward: read s, dy (and ds), write dx: for M N elements of e bytes
              2 e M N (4 e M N with a residual) forward, 3 e M N (4 e M N) backward
    FLOPs     about 5 M N forward, 10 M N backward
    backward  dx = rstd * (g - xhat * mean(g * xhat)) + ds   with g = dy * (offset + weight), xhat = s * rstd
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from vlm_kernels import reference
from vlm_kernels.common import Compilation, as_rows, check_same_shape, programs_for, remember, row_block, runs_kernel, triton_type
from vlm_kernels.launch import launch
from vlm_kernels.operation import operation


@triton.jit
def _forward_kernel(
    X, R, W, Y, S, RSTD, x_stride, r_stride, N, eps, offset, HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    x = tl.load(X + row * x_stride + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x = (x.to(tl.float32) + tl.load(R + row * r_stride + columns, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(S + row * N + columns, x, mask=inside)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / N + eps)
    tl.store(RSTD + row, rstd)
    weight = tl.load(W + columns, mask=inside, other=0.0).to(tl.float32) + offset
    normal = wide * rstd
    if not WIDE:
        normal = normal.to(x.dtype).to(tl.float32)
    tl.store(Y + row * N + columns, (normal * weight).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    DY, DS, S, W, RSTD, DX, DW, M, dy_stride, s_stride, N, offset, HAS_DS: tl.constexpr, WITH_DW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    weight = tl.load(W + columns, mask=inside, other=0.0).to(tl.float32) + offset
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    row = program.to(tl.int64)
    while row < M:
        dy = tl.load(DY + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(S + row * s_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row)
        xhat = s * rstd
        g = dy * weight
        dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=0) / N))
        if HAS_DS:
            dx += tl.load(DS + row * N + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + row * N + columns, dx.to(DX.dtype.element_ty), mask=inside)
        if WITH_DW:
            dw += dy * xhat
        row += tl.num_programs(0)
    if WITH_DW:
        tl.store(DW + program.to(tl.int64) * N + columns, dw, mask=inside)


@operation("rms_norm")
def _rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float, multiply_wide: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, s, rstd); s has no element without a residual."""
    rows = as_rows(x)
    M, N = rows.shape
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype) if not multiply_wide else x.dtype, device=x.device)
    s = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    if x.numel():
        more = as_rows(residual) if residual is not None else rows
        block, warps = row_block(N)
        launch(
            _forward_kernel, (M,),
            rows, more, weight, y, s, rstd, rows.stride(0), more.stride(0), N, eps, offset,
            HAS_RESIDUAL=residual is not None, WIDE=multiply_wide, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y, s, rstd


@_rms_norm.register_fake
def _(x, residual, weight, eps, offset, multiply_wide):
    dtype = torch.promote_types(x.dtype, weight.dtype) if not multiply_wide else x.dtype
    rows = x.numel() // max(x.shape[-1], 1)
    s = x.new_empty(x.shape if residual is not None else (0,))
    return x.new_empty(x.shape, dtype=dtype), s, x.new_empty(rows, dtype=torch.float32)


@operation("rms_norm_backward")
def _rms_norm_backward(
    dy: torch.Tensor, ds: torch.Tensor | None, s: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, offset: float, with_dw: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dw); dw has no element unless asked for."""
    rows, dy = as_rows(s), as_rows(dy)
    ds = ds.contiguous() if ds is not None else None
    M, N = rows.shape
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    programs = programs_for(M, s.device) if with_dw else max(M, 1)
    partial = torch.zeros((programs, N) if with_dw else (0, N), dtype=torch.float32, device=s.device)
    if s.numel():
        block, warps = row_block(N)
        launch(
            _backward_kernel, (programs,),
            dy, dy if ds is None else ds, rows, weight, rstd, dx, partial, M, dy.stride(0), rows.stride(0), N, offset,
            HAS_DS=ds is not None, WITH_DW=with_dw, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if with_dw else weight.new_empty(0)


@_rms_norm_backward.register_fake
def _(dy, ds, s, weight, rstd, offset, with_dw):
    return torch.empty(s.shape, dtype=s.dtype, device=s.device), weight.new_empty(weight.shape if with_dw else (0,))


def _setup(ctx, inputs, output):
    x, residual, weight, _, ctx.offset, _ = inputs
    _, s, rstd = output
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(s if ctx.has_residual else x, weight, rstd)
    ctx.mark_non_differentiable(*([rstd] if ctx.has_residual else [s, rstd]))


def _backward(ctx, dy, ds, _):
    s, weight, rstd = ctx.saved_tensors
    with_dw = ctx.needs_input_grad[2]
    if dy is None:  # of the sum alone something came of
        return ds, ds if ctx.has_residual else None, torch.zeros_like(weight) if with_dw else None, None, None, None
    dx, dw = _rms_norm_backward(dy, ds if ctx.has_residual else None, s, weight, rstd, ctx.offset, with_dw)
    return dx, dx if ctx.has_residual else None, dw if with_dw else None, None, None, None


_rms_norm.register_autograd(_backward, setup_context=_setup)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, residual: torch.Tensor | None = None, offset: float = 0.0,
    multiply_wide: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """RMSNorm over the last dimension.

    Args:
        x: [..., N], float32, bfloat16 or float16.
        weight: [N].
        residual: shape of x; is added first, and the sum comes back too.
        offset: added to the weight: 0 (Llama), 1 (Gemma 3).
        multiply_wide: multiply by the weight before rounding (Gemma), not after (Llama).

    Returns:
        y, or (y, x + residual).

    Raises:
        ValueError: shapes do not fit.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, the last dimension of x is {x.shape[-1]}")
    if residual is not None:
        check_same_shape("rms_norm", (x, residual))
    if not runs_kernel(x):
        total = x if residual is None else x + residual
        y = reference.rms_norm(total, weight, eps, offset=offset, multiply_wide=multiply_wide)
        return y if residual is None else (y, total)
    y, total, _ = _rms_norm(x, residual, weight, eps, offset, multiply_wide)
    remember(y, partial(_again, eps, offset, multiply_wide), x if residual is None else total, weight)
    return y if residual is None else (y, total)


def _again(eps: float, offset: float, multiply_wide: bool, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _rms_norm(x, None, weight, eps, offset, multiply_wide)[0]


def compilations() -> Iterator[Compilation]:
    """Forward with and without a residual and backward, at the hidden sizes of real models."""
    for hidden in (2048, 3584, 4096, 8192):
        block, warps = row_block(hidden)
        bf16 = triton_type(torch.bfloat16)
        for residual in (False, True):
            pointers = {"X": bf16, "R": bf16, "W": bf16, "Y": bf16, "S": bf16, "RSTD": "*fp32", "x_stride": "i32", "r_stride": "i32",
                        "N": "i32", "eps": "fp32", "offset": "fp32"}  # fmt: skip
            constants = {"HAS_RESIDUAL": residual, "WIDE": False, "BLOCK": block}
            yield Compilation(_forward_kernel, f"hidden {hidden}", pointers, constants, warps)
        pointers = {"DY": bf16, "DS": bf16, "S": bf16, "W": bf16, "RSTD": "*fp32", "DX": bf16, "DW": "*fp32", "M": "i32",
                    "dy_stride": "i32", "s_stride": "i32", "N": "i32", "offset": "fp32"}  # fmt: skip
        for with_dw in (False, True):
            constants = {"HAS_DS": True, "WITH_DW": with_dw, "BLOCK": block}
            yield Compilation(_backward_kernel, f"hidden {hidden}", pointers, constants, warps)
