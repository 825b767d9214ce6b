"""An implementation of experts for transformers' table (`ExpertsInterface`): places sorted by expert, products by `experts_product`.

Letters of shapes: N tokens, K experts for each, S = N x K places sorted by expert, E experts, H features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_dist.models.experts_product import expert_linear, expert_lora
from vlm_dist.upstream.transformers import apply_gate


def compute_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted sum of the chosen experts' outputs, [N, H], in the number type of `hidden_states`.

    Args:
        module: a module of transformers that holds experts; with adapters on it, `adapters`: by weight [(A, B, scaling)].
        hidden_states: [N, H].
        top_k_index: [N, K], numbers of experts.
        top_k_weights: [N, K].
    """
    chosen_S, top_k = top_k_index.reshape(-1), top_k_index.shape[-1]
    order_S = chosen_S.argsort(stable=True)
    counts_E = chosen_S.new_zeros(module.num_experts).scatter_add(0, chosen_S, torch.ones_like(chosen_S))
    if vars(module).get("watched"):  # training counts how many tokens each expert gets
        module.load = counts_E.clone() if vars(module).get("load") is None else module.load + counts_E
    dtype = _computing_dtype(module, hidden_states)
    x = _Spread.apply(hidden_states.to(dtype), order_S, top_k)
    x = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", x, counts_E, chosen_S, order_S)
    x = apply_gate(module, x) if module.has_gate else module.act_fn(x)
    x = _linear(module, "down_proj", x.to(dtype), counts_E, chosen_S, order_S)
    if module.has_post_expert_norm:
        x = module.post_expert_norm(x)
    return _Gather.apply(x * top_k_weights.reshape(-1)[order_S].unsqueeze(-1), order_S, top_k).to(hidden_states.dtype)


def _linear(module: Any, name: str, x: Tensor, counts_E: Tensor, chosen_S: Tensor, order_S: Tensor) -> Tensor:
    y = expert_linear(x, getattr(module, name), counts_E, transposed=module.is_transposed)
    if module.has_bias:
        y = y + getattr(module, f"{name}_bias")[chosen_S[order_S]].to(y.dtype)
    for a, b, scaling in vars(module).get("adapters", {}).get(name, ()):
        y = y + expert_lora(x, a, b, counts_E, scaling)
    return y


def _computing_dtype(module: Any, x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    state = getattr(module.down_proj, "quant_state", None)
    return module.down_proj.dtype if state is None else state.dtype


def _spread(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """[N, H] -> [S, H]."""
    return x[order // top_k]


def _gather(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """[S, H] -> [N, H], the places of a token added up: without atomic additions, so in the same order every time."""
    back = torch.zeros_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    return x[back].view(-1, top_k, x.shape[-1]).sum(1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return _spread(x, order, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grad, *ctx.saved_tensors, ctx.top_k), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return _gather(x, order, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(grad, *ctx.saved_tensors, ctx.top_k), None, None
