"""GeGLU (Shazeer 2020, arXiv:2002.05202) of a gated MLP, with GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415) exact or approximated.

y = gelu(gate) * up
exact     gelu(g) = g * Phi(g),  Phi(g) = (1 + erf(g / sqrt(2))) / 2
tanh      gelu(g) = g * (1 + tanh(u)) / 2,  u = sqrt(2 / pi) * (g + 0.044715 g^3)

shapes    gate, up, y [..., N]
saved     gate and up; the backward pass computes gelu again
bytes     forward: read gate and up, write y: 3 e M N; backward: read dy, gate, up, write dgate, dup: 5 e M N (e bytes an element)
FLOPs     about 12 M N forward, 22 M N backward
backward  dgate = dy * up * gelu'(g),  dup = dy * gelu(g);
          gelu' = Phi + g * exp(-g^2 / 2) / sqrt(2 pi), or (1 + tanh(u)) / 2 + g / 2 * (1 - tanh(u)^2) * u'
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from vlm_kernels import reference
from vlm_kernels.common import Compilation, as_rows, check_same_shape, runs_kernel, triton_type
from vlm_kernels.launch import launch
from vlm_kernels.operation import operation

BLOCK = 1024


@triton.jit
def _gelu_and_slope(g, TANH: tl.constexpr):
    """(gelu(g), gelu'(g)) in float32."""
    if TANH:
        u = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * u) + 1.0)  # saturates, where exp overflows, to 1
        slope = 0.5 * (1.0 + tanh) + 0.5 * g * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
        return 0.5 * g * (1.0 + tanh), slope
    phi = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    return g * phi, phi + g * tl.exp(-0.5 * g * g) * 0.3989422804014327


@triton.jit
def _forward_kernel(GATE, UP, Y, gate_stride, up_stride, N, TANH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    gate = tl.load(GATE + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gelu, _ = _gelu_and_slope(gate, TANH)
    tl.store(Y + row * N + columns, (gelu * up).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    DY, GATE, UP, DGATE, DUP, Y, gate_stride, up_stride, d_stride, N, TANH: tl.constexpr, WITH_Y: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    dy = tl.load(DY + row * N + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gelu, slope = _gelu_and_slope(gate, TANH)
    tl.store(DGATE + row * d_stride + columns, (dy * up * slope).to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + row * d_stride + columns, (dy * gelu).to(DUP.dtype.element_ty), mask=inside)
    if WITH_Y:
        tl.store(Y + row * N + columns, (gelu * up).to(Y.dtype.element_ty), mask=inside)


@operation("geglu")
def _geglu(gate: torch.Tensor, up: torch.Tensor, tanh: bool) -> torch.Tensor:
    rows, ups = as_rows(gate), as_rows(up)
    M, N = rows.shape
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        launch(_forward_kernel, (M, triton.cdiv(N, BLOCK)), rows, ups, y, rows.stride(0), ups.stride(0), N, TANH=tanh, BLOCK=BLOCK)
    return y


@_geglu.register_fake
def _(gate, up, tanh):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@operation("geglu_backward")
def _geglu_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, tanh: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, ups, dy = as_rows(gate), as_rows(up), dy.contiguous()
    M, N = rows.shape
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if gate.numel():
        grid = (M, triton.cdiv(N, BLOCK))
        strides = rows.stride(0), ups.stride(0), N
        launch(_backward_kernel, grid, dy, rows, ups, dgate, dup, dy, *strides, N, TANH=tanh, WITH_Y=False, BLOCK=BLOCK)
    return dgate, dup


@_geglu_backward.register_fake
def _(dy, gate, up, tanh):
    return tuple(torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))


def _setup(ctx, inputs, output):
    gate, up, ctx.tanh = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, dy):
    return *_geglu_backward(dy, *ctx.saved_tensors, ctx.tanh), None


_geglu.register_autograd(_backward, setup_context=_setup)


def geglu(gate: torch.Tensor, up: torch.Tensor, *, tanh: bool = True) -> torch.Tensor:
    """gelu(gate) * up.

    Args:
        gate, up: [..., N], of one dtype; halves of one tensor may be given as they are.
        tanh: the approximation that Gemma uses; False: exact.

    Returns:
        y, of the shape and dtype of gate.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape("geglu", (gate, up))
    return _geglu(gate, up, tanh) if runs_kernel(gate) else reference.geglu(gate, up, tanh=tanh)


@operation("geglu_gradients")
def _geglu_gradients(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, tanh: bool) -> tuple[torch.Tensor, torch.Tensor]:
    M, N = gate.shape
    dy = dy.contiguous()
    both, y = (torch.empty((M, width), dtype=gate.dtype, device=gate.device) for width in (2 * N, N))
    if gate.numel():
        grid = (M, triton.cdiv(N, BLOCK))
        strides = gate.stride(0), up.stride(0), 2 * N
        launch(_backward_kernel, grid, dy, gate, up, both, both[:, N:], y, *strides, N, TANH=tanh, WITH_Y=True, BLOCK=BLOCK)
    return both, y


@_geglu_gradients.register_fake
def _(dy, gate, up, tanh):
    M, N = gate.shape
    return tuple(torch.empty((M, width), dtype=gate.dtype, device=gate.device) for width in (2 * N, N))


def geglu_gradients(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, tanh: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """What a backward pass that kept no result needs, in one launch; see `swiglu.swiglu_gradients`."""
    if runs_kernel(gate):
        return _geglu_gradients(dy, gate, up, tanh)
    return reference.gate_gradients(partial(reference.geglu, tanh=tanh), dy, gate, up)


def compilations() -> Iterator[Compilation]:
    """Forward and backward, both forms; one block size serves every width."""
    bf16 = triton_type(torch.bfloat16)
    strides = {"gate_stride": "i32", "up_stride": "i32", "N": "i32"}
    for tanh in (True, False):
        shape = f"width 10240, {'tanh' if tanh else 'exact'}"
        constants = {"TANH": tanh, "BLOCK": BLOCK}
        yield Compilation(_forward_kernel, shape, {"GATE": bf16, "UP": bf16, "Y": bf16, **strides}, constants)
        pointers = {"DY": bf16, "GATE": bf16, "UP": bf16, "DGATE": bf16, "DUP": bf16, "Y": bf16, **strides, "d_stride": "i32"}
        for with_y in (False, True):
            yield Compilation(_backward_kernel, shape, pointers, {**constants, "WITH_Y": with_y})
