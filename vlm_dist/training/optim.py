"""The optimizer, and the learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vlm_dist.config import OptimConfig

if TYPE_CHECKING:
    import torch


def build_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) over the trainable parameters; bitsandbytes' 8-bit form keeps its moments in
    one byte each (Dettmers et al. 2021, arXiv:2110.02861). Biases, norms and other one-dimensional weights do not decay."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, **settings)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of `steps`: linear warm-up, then cosine, linear or constant down to
    lr * min_lr_ratio."""
    warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, steps - warmup)
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
