"""4-bit NormalFloat with double quantisation (Dettmers et al. 2023, arXiv:2305.14314, section 3) -> 16 or 32 bit, in one launch.

    w[i] = table[code(i)] * (scale_table[absmax[i / 64]] * outer[i / 64 / 256] + offset)

    shapes    codes [n / 2] uint8, the high four bits are the first of two; absmax [n / 64] uint8; outer [n / 64 / 256] float32;
              table [16], scale_table [256] float32; w [N, K] with N K = n
    saved     nothing: weights in 4 bit do not train
    bytes     read n / 2 + n / 64 (and 4 n / 16384), write e n: 0.516 + e a weight (e bytes an element)
    FLOPs     3 a weight
    backward  none

The order of operations is that of bitsandbytes (a product and a sum in float32, then a product, then one rounding), so the result is
the same to the bit. That takes fusing of product and sum turned off (`enable_fp_fusion`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from vlm_kernels import reference
from vlm_kernels.common import Compilation, runs_kernel, triton_type
from vlm_kernels.launch import launch
from vlm_kernels.operation import Operation, bytes_of, operation

BLOCK = 1024  # bytes of codes a program reads


@triton.jit
def block_scale(ABSMAX, SCALE_TABLE, OUTER, offset, block, inside, OUTER_BLOCK: tl.constexpr, NESTED: tl.constexpr):
    """The float32 maximum of each block of weights."""
    if NESTED:
        code = tl.load(ABSMAX + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(SCALE_TABLE + code, mask=inside, other=0.0) * tl.load(OUTER + block // OUTER_BLOCK, mask=inside, other=0.0)
        scale += offset
    else:
        scale = tl.load(ABSMAX + block, mask=inside, other=0.0)
    return scale


@triton.jit
def _kernel(
    CODES, ABSMAX, TABLE, SCALE_TABLE, OUTER, OFFSET, W, num_bytes, num_weights, columns, stride, BLOCKSIZE: tl.constexpr,
    OUTER_BLOCK: tl.constexpr, NESTED: tl.constexpr, APART: tl.constexpr, TORN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCKSIZE // 2  # bytes of a block of weights, which has one scale
    block = tl.program_id(0).to(tl.int64) * (BLOCK // HALF) + tl.arange(0, BLOCK // HALF)
    scale = block_scale(ABSMAX, SCALE_TABLE, OUTER, tl.load(OFFSET), block, block * HALF < num_bytes, OUTER_BLOCK, NESTED)[:, None]
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(CODES + byte, mask=byte < num_bytes, other=0).to(tl.int32)
    high = tl.load(TABLE + (pair >> 4)) * scale
    low = tl.load(TABLE + (pair & 15)) * scale
    first = block * BLOCKSIZE
    inside = tl.arange(0, BLOCKSIZE)[None, :]
    place = first[:, None] + inside
    inside_weight = place < num_weights
    if APART:  # there is a gap behind each row
        place += (first // columns * (stride - columns))[:, None]
    if TORN:  # and a block may begin before it and end behind it
        place += tl.where((first % columns)[:, None] + inside >= columns, stride - columns, 0)
    tl.store(W + place, tl.interleave(high, low).to(W.dtype.element_ty), mask=inside_weight)


@operation("nf4_dequantize")
def _nf4_dequantize(
    codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, scale_table: torch.Tensor | None, outer: torch.Tensor | None,
    offset: torch.Tensor | None, shape: list[int], dtype: torch.dtype, blocksize: int, outer_blocksize: int,
) -> torch.Tensor:  # fmt: skip
    w = torch.empty(shape, dtype=dtype, device=codes.device)
    _write(codes, absmax, table, scale_table, outer, offset, w, blocksize, outer_blocksize)
    return w


def _write(
    codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, scale_table: torch.Tensor | None, outer: torch.Tensor | None,
    offset: torch.Tensor | None, w: torch.Tensor, blocksize: int, outer_blocksize: int,
) -> None:  # fmt: skip
    codes = bytes_of(codes)
    if w.numel():
        nested, columns = scale_table is not None, w.shape[-1]
        stride = w.stride(0) if w.ndim == 2 else columns
        launch(
            _kernel, (triton.cdiv(codes.numel(), BLOCK),),
            codes, absmax, table, scale_table if nested else table, outer if nested else table, offset if nested else table, w,
            codes.numel(), w.numel(), columns, stride, BLOCKSIZE=blocksize, OUTER_BLOCK=outer_blocksize, NESTED=nested,
            APART=stride > columns, TORN=stride > columns and columns % blocksize > 0, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip


_nf4_dequantize_into = Operation("nf4_dequantize_into", _write, {"w"})


@_nf4_dequantize_into.register_fake
def _(codes, absmax, table, scale_table, outer, offset, w, blocksize, outer_blocksize):
    return None


@_nf4_dequantize.register_fake
def _(codes, absmax, table, scale_table, outer, offset, shape, dtype, blocksize, outer_blocksize):
    return codes.new_empty(shape, dtype=dtype)


def nf4_dequantize(
    codes: torch.Tensor, state: Any, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """The weights that a bitsandbytes 4-bit parameter stands for.

    Args:
        codes: the packed weights, stored in any dtype.
        state: their `bitsandbytes.functional.QuantState` (quant_type nf4 or fp4; double quantisation or not).
        dtype: of the result; None: the dtype that was quantised.
        out: [N, K], each row contiguous: where the weights shall lie, in its dtype. Rows may lie apart.

    Returns:
        w: [N, K], the `state.shape`, in that dtype.
    """
    nested = state.state2 if state.nested else None
    if not runs_kernel(state.absmax):
        absmax = state.absmax
        if nested is not None:
            absmax = reference.nested_absmax(absmax, state.offset, nested.code, nested.absmax, nested.blocksize)
        packed = codes.contiguous().view(torch.uint8)
        wanted = out.dtype if out is not None else dtype or state.dtype
        w = reference.nf4_dequantize(packed, absmax, state.code, state.shape, wanted, state.blocksize)
        return w if out is None else out.copy_(w)
    outer = (nested.code, nested.absmax, state.offset) if nested is not None else (None, None, None)
    outer_blocksize = nested.blocksize if nested is not None else 1
    if out is not None and not out.is_contiguous() and out.shape[-1] < state.blocksize:  # a block would reach over several rows
        return out.copy_(nf4_dequantize(codes, state, out.dtype))
    if out is not None:
        _nf4_dequantize_into(codes, state.absmax, state.code, *outer, out, state.blocksize, outer_blocksize)
        return out
    return _nf4_dequantize(
        codes, state.absmax, state.code, *outer, list(state.shape), dtype or state.dtype, state.blocksize, outer_blocksize
    )


def compilations() -> Iterator[Compilation]:
    """One block size serves every weight."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for nested, apart, torn in ((True, False, False), (False, False, False), (True, True, False), (True, True, True)):
            pointers = {"CODES": "*u8", "ABSMAX": "*u8" if nested else "*fp32", "TABLE": "*fp32", "SCALE_TABLE": "*fp32", "OUTER": "*fp32",
                        "OFFSET": "*fp32", "W": triton_type(dtype), "num_bytes": "i64", "num_weights": "i64", "columns": "i32",
                        "stride": "i32"}  # fmt: skip
            constants = {"BLOCKSIZE": 64, "OUTER_BLOCK": 256, "NESTED": nested, "APART": apart, "TORN": torn, "BLOCK": BLOCK}
            shape = f"any weight to {str(dtype).removeprefix('torch.')}"
            yield Compilation(_kernel, shape, pointers, constants, options={"enable_fp_fusion": False})
