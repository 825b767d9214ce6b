"""SwiGLU (Shazeer 2020, arXiv:2002.05202) of a gated MLP.

y = silu(gate) * up,   silu(g) = g * sigmoid(g)

shapes    gate, up, y [..., N]
saved     gate and up; the backward pass computes silu again
bytes     forward: read gate and up, write y: 3 e M N; backward: read dy, gate, up, write dgate, dup: 5 e M N (e bytes an element)
FLOPs     about 6 M N forward, 12 M N backward
backward  dgate = dy * up * sigmoid(g) * (1 + g * (1 - sigmoid(g))),   dup = dy * silu(g)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from vlm_kernels import reference
from vlm_kernels.common import Compilation, as_rows, check_same_shape, runs_kernel, triton_type
from vlm_kernels.launch import launch
from vlm_kernels.operation import operation

BLOCK = 1024


@triton.jit
def _forward_kernel(GATE, UP, Y, gate_stride, up_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    gate = tl.load(GATE + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(Y + row * N + columns, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    DY, GATE, UP, DGATE, DUP, Y, gate_stride, up_stride, d_stride, N, WITH_Y: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    dy = tl.load(DY + row * N + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(DGATE + row * d_stride + columns, dgate.to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + row * d_stride + columns, (dy * gate * sigmoid).to(DUP.dtype.element_ty), mask=inside)
    if WITH_Y:
        tl.store(Y + row * N + columns, (gate * sigmoid * up).to(Y.dtype.element_ty), mask=inside)


@operation("swiglu")
def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    rows, ups = as_rows(gate), as_rows(up)
    M, N = rows.shape
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        launch(_forward_kernel, (M, triton.cdiv(N, BLOCK)), rows, ups, y, rows.stride(0), ups.stride(0), N, BLOCK=BLOCK)
    return y


@_swiglu.register_fake
def _(gate, up):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@operation("swiglu_backward")
def _swiglu_backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, ups, dy = as_rows(gate), as_rows(up), dy.contiguous()
    M, N = rows.shape
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if gate.numel():
        grid = (M, triton.cdiv(N, BLOCK))
        launch(_backward_kernel, grid, dy, rows, ups, dgate, dup, dy, rows.stride(0), ups.stride(0), N, N, WITH_Y=False, BLOCK=BLOCK)
    return dgate, dup


@_swiglu_backward.register_fake
def _(dy, gate, up):
    return tuple(torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_setup)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    Args:
        gate, up: [..., N], of one dtype; halves of one tensor may be given as they are.

    Returns:
        y, of the shape and dtype of gate.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape("swiglu", (gate, up))
    return _swiglu(gate, up) if runs_kernel(gate) else reference.swiglu(gate, up)


@operation("swiglu_gradients")
def _swiglu_gradients(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    M, N = gate.shape
    dy = dy.contiguous()
    both, y = (torch.empty((M, width), dtype=gate.dtype, device=gate.device) for width in (2 * N, N))
    if gate.numel():
        grid = (M, triton.cdiv(N, BLOCK))
        strides = gate.stride(0), up.stride(0), 2 * N
        launch(_backward_kernel, grid, dy, gate, up, both, both[:, N:], y, *strides, N, WITH_Y=True, BLOCK=BLOCK)
    return both, y


@_swiglu_gradients.register_fake
def _(dy, gate, up):
    M, N = gate.shape
    return tuple(torch.empty((M, width), dtype=gate.dtype, device=gate.device) for width in (2 * N, N))


def swiglu_gradients(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a backward pass that kept no result needs, in one launch.

    Args:
        dy: [M, N], the gradient of silu(gate) * up.
        gate, up: [M, N] with contiguous rows.

    Returns:
        ([M, 2 N]: the gradients of gate and of up, [M, N]: silu(gate) * up again).
    """
    if runs_kernel(gate):
        return _swiglu_gradients(dy, gate, up)
    return reference.gate_gradients(reference.swiglu, dy, gate, up)


def compilations() -> Iterator[Compilation]:
    """Forward and backward; one block size serves every width."""
    bf16 = triton_type(torch.bfloat16)
    strides = {"gate_stride": "i32", "up_stride": "i32", "N": "i32"}
    for width in (8192, 18944, 14336, 28672):
        yield Compilation(_forward_kernel, f"width {width}", {"GATE": bf16, "UP": bf16, "Y": bf16, **strides}, {"BLOCK": BLOCK})
        pointers = {"DY": bf16, "GATE": bf16, "UP": bf16, "DGATE": bf16, "DUP": bf16, "Y": bf16, **strides, "d_stride": "i32"}
        for with_y in (False, True):
            yield Compilation(_backward_kernel, f"width {width}", pointers, {"WITH_Y": with_y, "BLOCK": BLOCK})
