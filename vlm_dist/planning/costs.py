"""Operations whose cost does not show in their arguments: what each computes, moves and needs for a moment. Each rule takes the Shapes
that counts, the operation and its arguments, and gives the operation's result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlm_dist.models.patching_loss import workspace_bytes
from vlm_dist.planning.counts import nbytes_of


def _head_and_loss(shapes: Any, func: Any, args: tuple, kwargs: dict) -> Any:
    """vlm_kernels.linear_cross_entropy: how many rows are supervised is read off the labels; a chunk of logits exists for a moment."""
    hidden, weight, bias, labels, *_, with_grad, with_dw, known = args
    rows = int((labels >= 0).sum())
    if known is None:
        shapes.wait("nonzero")
    products = 1 + with_grad + with_dw
    shapes.launch(func, 2 * rows * weight.numel() * products, nbytes_of(weight) * products + 2 * rows * hidden.shape[1])
    shapes.use(workspace_bytes(rows, weight, "cuda" if shapes.on_gpu else "cpu"), briefly=True)
    return shapes.made(
        lambda: (
            torch.empty(()),
            torch.empty(rows, dtype=torch.int64),
            hidden.new_empty((rows if with_grad else 0, hidden.shape[1])),
            weight.new_empty(weight.shape if with_dw else (0,)),
            weight.new_empty(len(weight) if with_dw and bias is not None else 0),
        )
    )


def _four_bit_product(shapes: Any, func: Any, args: tuple, kwargs: dict) -> Any:
    """bitsandbytes' product with 4-bit weights: they are put into 16 bit for the moment."""
    x, shape = args[0], args[2]
    size = shape[0] * shape[1]
    shapes.launch(func, 2 * (x.numel() // x.shape[-1]) * size, 3 * size * x.element_size())
    shapes.use(size * x.element_size(), briefly=True)
    return shapes.made(lambda: x.new_empty((*x.shape[:-1], shape[0])))


def _of_experts(shapes: Any, func: Any, args: tuple, kwargs: dict) -> Any:
    """The products of experts: of packed weights those that were hit are put into 16 bit for the moment, where a GPU computes all in one
    product; how many are hit is not known without numbers, and taken to be as many as can be."""
    x, weight, statistics, counts, packed, _ = args
    result = shapes.run(func, args, kwargs)
    hit = min(len(counts), len(x))
    size = hit * (packed[1] * packed[2] if packed else weight[0].numel())
    read = hit * nbytes_of(weight) // len(counts) + sum(map(nbytes_of, statistics)) * hit // len(counts)
    moved = read + (2 * size * x.element_size() if packed else 0) + nbytes_of(x) + nbytes_of(result)
    shapes.launch(func, 2 * x.numel() * result.shape[1], moved)
    if packed and shapes.on_gpu:  # unpacked into one buffer for all layers; the codes of those that are hit, and their scales, are copied
        shapes.keep(size * x.element_size())
        shapes.use(size // 2 + 2 * 4 * size // packed[3], briefly=True)
    elif packed:
        shapes.use(size // hit * x.element_size(), briefly=True)
    return result


def _outer_of_experts(shapes: Any, func: Any, args: tuple, kwargs: dict) -> Any:
    """Their products for gradients."""
    left, right, _ = args
    result = shapes.run(func, args, kwargs)
    shapes.launch(func, 2 * left.numel() * right.shape[1], sum(map(nbytes_of, (left, right, result))))
    return result


RULES: dict[Any, Callable[..., Any]] = {}


def _add_rules() -> None:
    """Operations whose cost does not show in their arguments; their modules register them when they are imported."""
    import bitsandbytes  # noqa: F401

    import vlm_dist.models.experts_product  # noqa: F401

    RULES[torch.ops.vlm_kernels.linear_cross_entropy] = _head_and_loss
    RULES[torch.ops.bitsandbytes.gemm_4bit] = _four_bit_product
    RULES[torch.ops.vlm_dist.expert_product] = _of_experts
    RULES[torch.ops.vlm_dist.expert_outer] = _outer_of_experts


_add_rules()
