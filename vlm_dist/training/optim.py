"""The optimizer, and the learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.config import OptimConfig
from vlm_dist.errors import MachineError, words_of
from vlm_dist.families import Family
from vlm_dist.models.experts import of_experts
from vlm_dist.training.compiling import wait_for_compilation
from vlm_dist.upstream.deepspeed import shape_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def build_optimizer(model: torch.nn.Module, config: OptimConfig, family: Family, *, on_cpu: bool = False) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) over the trainable parameters; bitsandbytes' 8-bit form keeps its moments in
    one byte each (Dettmers et al. 2021, arXiv:2110.02861). Biases, norms and other one-dimensional weights do not decay. Each group
    carries `lr_scale`: its side's learning rate relative to optim.lr. On a GPU torch's updates all weights in a few launches. With
    `on_cpu` it is DeepSpeed's AdamW for offloaded weights, which is compiled when it is first used."""
    import torch

    rates = {"vision": config.lr_vision, "projector": config.lr_projector, "language": config.lr_language, "experts": config.lr_experts}
    members: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.removeprefix("base_model.model.")
            part = "experts" if of_experts(plain) and config.lr_experts else family.side_of(plain)
            used.add(part)
            rate = rates[part] or config.lr
            decay = config.weight_decay if len(shape_of(parameter)) > 1 else 0.0
            members.setdefault((rate / config.lr, decay), []).append(parameter)
    for part in (part for part, rate in rates.items() if rate and part not in used):
        logger.warning("optim.lr_%s: nothing of it trains here, so it has no effect", part)
    groups = [{"params": params, "lr_scale": scale, "weight_decay": decay} for (scale, decay), params in members.items()]
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(groups, **settings)
    if on_cpu:
        return _cpu_adam(groups, settings)
    on_gpu = all(parameter.is_cuda for params in members.values() for parameter in params)
    return torch.optim.AdamW(groups, **settings, fused=on_gpu or None)


def _cpu_adam(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    folder = str(Path(sys.executable).parent)  # ninja lies beside Python
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    wait_for_compilation("cpu_adam")
    try:
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    except Exception as error:  # DeepSpeed has its own, of CUDA that is missing or does not fit
        raise MachineError(
            f"engine.offload: DeepSpeed's CPU optimizer cannot be compiled ({words_of(error)}); it needs g++, and "
            "beside a GPU nvcc of torch's CUDA version. Install that, or set engine.offload: none"
        ) from None


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
