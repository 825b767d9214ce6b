"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys in one launch; with one or three position axes
(M-RoPE, Qwen2-VL, arXiv:2409.12191).

    y[i]       = x[i] * cos[i] - x[i + R/2] * sin[i]          for i < R/2
    y[i + R/2] = x[i + R/2] * cos[i] + x[i] * sin[i]
    y[j]       = x[j]                                         for j >= R (partial rotary)

    shapes    q [B, H, T, D], k [B, K, T, D] with any strides but 1 in D; cos, sin [A, B or 1, T, R], A = 1 or 3; their halves are alike,
              as transformers makes them, and only the first is read; axis [R/2]: which of the A axes a pair takes its angle from
    saved     cos, sin and axis
    bytes     read and write q and k once: 2 e B T D (H + K), cos and sin once a token: 2 e B T R / 2
    FLOPs     6 for each pair: 3 B T R (H + K)
    backward  the inverse rotation, i.e. the same with -sin
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from vlm_kernels import reference
from vlm_kernels.common import Compilation, runs_kernel, triton_type
from vlm_kernels.launch import launch
from vlm_kernels.operation import operation


@triton.jit
def _rotate_heads(
    X, Y, cos, sin, x_head, y_head, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    for start in range(0, HEADS, BLOCK_HEADS):
        heads = start + tl.arange(0, BLOCK_HEADS).to(tl.int64)[:, None]
        pair = tl.arange(0, BLOCK_HALF)[None, :]
        inside = (heads < HEADS) & (pair < HALF)
        first = tl.load(X + heads * x_head + pair, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(X + heads * x_head + pair + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(Y + heads * y_head + pair, (first * cos - second * sin).to(Y.dtype.element_ty), mask=inside)
        tl.store(Y + heads * y_head + pair + HALF, (second * cos + first * sin).to(Y.dtype.element_ty), mask=inside)
        if 2 * HALF < D:
            rest = 2 * HALF + tl.arange(0, BLOCK_TAIL)[None, :]
            inside = (heads < HEADS) & (rest < D)
            tl.store(Y + heads * y_head + rest, tl.load(X + heads * x_head + rest, mask=inside, other=0.0), mask=inside)


@triton.jit
def _kernel(
    Q, K, QY, KY, COS, SIN, AXIS, T, q_batch, q_head, q_token, k_batch, k_head, k_token, qy_batch, qy_head, qy_token, ky_batch, ky_head,
    ky_token, cos_axis, cos_batch, H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    batch, token = number // T, number % T
    pair = tl.arange(0, BLOCK_HALF)
    axis = tl.load(AXIS + pair, mask=pair < HALF, other=0)
    place = axis.to(tl.int64) * cos_axis + batch * cos_batch + token * (2 * HALF) + pair
    cos = tl.load(COS + place, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + place, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    _rotate_heads(
        Q + batch * q_batch + token * q_token, QY + batch * qy_batch + token * qy_token, cos, sin, q_head, qy_head, H, D, HALF, BLOCK_HALF,
        BLOCK_TAIL, BLOCK_HEADS,
    )  # fmt: skip
    _rotate_heads(
        K + batch * k_batch + token * k_token, KY + batch * ky_batch + token * ky_token, cos, sin, k_head, ky_head, KH, D, HALF, BLOCK_HALF,
        BLOCK_TAIL, BLOCK_HEADS,
    )  # fmt: skip


def _blocks(heads: int, rotated: int, head_dim: int) -> dict[str, int]:
    return {
        "BLOCK_HALF": triton.next_power_of_2(rotated // 2),
        "BLOCK_TAIL": triton.next_power_of_2(max(head_dim - rotated, 1)),
        "BLOCK_HEADS": min(16, triton.next_power_of_2(heads)),
    }


@operation("rope")
def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, axis: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    qy, ky = torch.empty_like(q), torch.empty_like(k)
    B, H, T, D = q.shape
    if q.numel():
        launch(
            _kernel, (B * T,),
            q, k, qy, ky, cos, sin, axis, T, *q.stride()[:3], *k.stride()[:3], *qy.stride()[:3], *ky.stride()[:3],
            cos.stride(0), cos.stride(1) if cos.shape[1] > 1 else 0,
            H=H, KH=k.shape[1], D=D, HALF=cos.shape[-1] // 2, INVERSE=inverse, **_blocks(H, cos.shape[-1], D),
        )  # fmt: skip
    return qy, ky


@_rope.register_fake
def _(q, k, cos, sin, axis, inverse):
    return tuple(torch.empty_like(x if x.stride(-1) == 1 else x.contiguous()) for x in (q, k))


def _setup(ctx, inputs, output):
    _, _, cos, sin, axis, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, axis)


def _backward(ctx, dq, dk):
    return *_rope(dq, dk, *ctx.saved_tensors, not ctx.inverse), None, None, None, None


_rope.register_autograd(_backward, setup_context=_setup)


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions.

    Args:
        q: [B, H, T, D]; k: [B, K, T, D].
        cos, sin: [B or 1, T, R] with R <= D, both halves alike; the first R dimensions are rotated.

    Returns:
        (q, k) rotated, in their own dtype.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(q, k, cos, sin)
    if not runs_kernel(q):
        return reference.rope(q, k, cos, sin)
    axis = torch.zeros(cos.shape[-1] // 2, dtype=torch.int32, device=q.device)
    return _rope(q, k, cos.unsqueeze(0).contiguous(), sin.unsqueeze(0).contiguous(), axis, False)


def mrope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sections: Sequence[int], *, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by positions in time, height and width.

    Args:
        q: [B, H, T, D]; k: [B, K, T, D].
        cos, sin: [3, B or 1, T, R], both halves alike.
        sections: pairs that take their angle from each axis; they sum to R / 2.
        interleaved: the axes alternate (Qwen3-VL); else they follow one another (Qwen2-VL).

    Returns:
        (q, k) rotated, in their own dtype.

    Raises:
        ValueError: shapes do not fit.
    """
    if cos.shape[0] != 3 or 2 * sum(sections) != cos.shape[-1]:
        raise ValueError(
            f"mrope: cos has shape {tuple(cos.shape)}; expected [3, B, T, R] with R = 2 x {sum(sections)}, the sum of sections"
        )
    _check(q, k, cos[0], sin[0])
    if not runs_kernel(q):
        angles = [reference.mrope_angles(values, sections, interleaved=interleaved) for values in (cos, sin)]
        return reference.rope(q, k, *angles)
    axis = torch.tensor(reference.axis_of_pairs(sections, interleaved), dtype=torch.int32, device=q.device)
    return _rope(q, k, cos.contiguous(), sin.contiguous(), axis, False)


def _check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    (B, _, T, D), (KB, _, KT, KD) = q.shape, k.shape
    R = cos.shape[-1]
    if (B, T, D) != (KB, KT, KD) or cos.shape != sin.shape or cos.shape[0] not in (1, B) or cos.shape[1] != T or R > D or R % 2:
        raise ValueError(
            f"rope: q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; "
            "expected [B, H, T, D], [B, K, T, D] and twice [B or 1, T, R] with an even R up to D"
        )


def compilations() -> Iterator[Compilation]:
    """Language models' and vision towers' heads, forward and backward."""
    bf16 = triton_type(torch.bfloat16)
    strides = [f"{name}_{part}" for name in ("q", "k", "qy", "ky") for part in ("batch", "head", "token")]
    for heads, key_heads, head_dim in ((32, 8, 64), (28, 4, 128), (32, 8, 128), (16, 16, 80)):
        for inverse in (False, True):
            pointers = {"Q": bf16, "K": bf16, "QY": bf16, "KY": bf16, "COS": bf16, "SIN": bf16, "AXIS": "*i32", "T": "i32",
                        **dict.fromkeys([*strides, "cos_axis", "cos_batch"], "i32")}  # fmt: skip
            constants = {"H": heads, "KH": key_heads, "D": head_dim, "HALF": head_dim // 2, "INVERSE": inverse,
                         **_blocks(heads, head_dim, head_dim)}  # fmt: skip
            yield Compilation(_kernel, f"heads {heads} + {key_heads} of {head_dim}", pointers, constants)
