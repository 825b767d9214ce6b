"""What each kernel computes, in plain PyTorch: readable, differentiable, in the precision of its arguments.

Tests call these with float64; on a CPU some are the public functions' own path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

IGNORED = -100


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, multiply_wide: bool = False) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension."""
    wide = x.to(_at_least_float32(x))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if multiply_wide:
        return (normal * (offset + weight.to(wide.dtype))).to(x.dtype)
    return (offset + weight if offset else weight) * normal.to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def geglu(gate: torch.Tensor, up: torch.Tensor, *, tanh: bool = True) -> torch.Tensor:
    """gelu(gate) * up; tanh: the approximation."""
    return F.gelu(gate, approximate="tanh" if tanh else "none") * up


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """Rows [S, K] sorted by group, each times the weight of its group: [G, N, K], or [G, K, N] with `transposed`."""
    groups = zip(x.split(counts.tolist()), weight, strict=True)
    return torch.cat([rows @ (one if transposed else one.T) for rows, one in groups])


def grouped_outer(left: torch.Tensor, right: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[S, N], [S, K] -> [G, N, K]: of each group the sum over its rows of left^T right."""
    sizes = counts.tolist()
    return torch.stack([ours.T @ others for ours, others in zip(left.split(sizes), right.split(sizes), strict=True)])


def gate_gradients(
    gated: Callable, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """([M, 2 N]: gradients of gate and of up, [M, N]: their gated product again), by autograd."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(True) for tensor in (gate, up)]
        y = gated(*leaves)
    return torch.cat(torch.autograd.grad(y, leaves, dy), dim=1), y.detach()


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first R of D dimensions: pairs (i, i + R/2) by the angles whose cosines and sines are given.

    Args:
        q, k: [B, H, T, D].
        cos, sin: [B or 1, T, R]; both halves alike, as transformers makes them.
    """
    rotated = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(x: torch.Tensor) -> torch.Tensor:
        head, tail = x[..., :rotated], x[..., rotated:]
        first, second = head.chunk(2, dim=-1)
        turned = head * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((turned, tail), dim=-1).to(x.dtype)

    return turn(q), turn(k)


def mrope_angles(values: torch.Tensor, sections: Sequence[int], *, interleaved: bool = False) -> torch.Tensor:
    """[3, B, T, R] cosines or sines of the three axes -> [B, T, R]: each pair's angle from the axis that its section names."""
    axis = torch.tensor(axis_of_pairs(sections, interleaved), device=values.device).repeat(2)
    return torch.gather(values, 0, axis.expand(1, *values.shape[1:])).squeeze(0)


def axis_of_pairs(sections: Sequence[int], interleaved: bool) -> list[int]:
    """The axis (0 time, 1 height, 2 width) of each of the R/2 pairs: runs of the sections' lengths (Qwen2-VL), or interleaved
    t h w t h w ... with the rest t (Qwen3-VL)."""
    if not interleaved:
        return [axis for axis, length in enumerate(sections) for _ in range(length)]
    axes = [0] * sum(sections)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = [axis] * len(axes[axis : 3 * sections[axis] : 3])
    return axes


def nf4_dequantize(
    codes: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, blocksize: int
) -> torch.Tensor:
    """Two 4-bit codes a byte, high one first -> table[code] * absmax of the code's block."""
    pairs = codes.flatten().view(torch.uint8)
    unpacked = torch.stack((pairs >> 4, pairs & 15), dim=1).flatten()[: _numel(shape)].int()
    scales = absmax.repeat_interleave(blocksize)[: unpacked.numel()]
    return (table[unpacked] * scales).to(dtype).view(*shape)


def nested_absmax(
    absmax: torch.Tensor, offset: torch.Tensor, table: torch.Tensor, outer: torch.Tensor, blocksize: int = 256
) -> torch.Tensor:
    """Double quantisation's second step (Dettmers et al. 2023, section 3): 8-bit block maxima -> float32."""
    return table[absmax.int()] * outer.repeat_interleave(blocksize)[: absmax.numel()] + offset


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, bias: torch.Tensor | None = None, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(sum over labelled rows of cross-entropy + z_loss * logsumexp^2, number of labelled rows)."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(_at_least_float32(logits))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
    kept = labels != IGNORED
    if z_loss:
        loss = loss + z_loss * logits[kept].logsumexp(-1).square().sum()
    return loss, kept.sum()


def _at_least_float32(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
