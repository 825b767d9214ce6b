"""DeepSpeed: two things that it does too early or too late."""

from __future__ import annotations

from typing import Any

SEEN = "0.19.8"
NAMES = (
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3",
    "deepspeed.ops",
)


def skip_shared_memory_op() -> None:
    """DeepSpeed compiles a shared-memory collective for CPU ranks when it first starts: 20 s and a compiler, for a path that one GPU
    or one process never takes. It asks this table whether it may; the table itself costs a probe of every op."""
    import deepspeed.ops

    if "__compatible_ops__" not in vars(deepspeed.ops):
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010


def create_moments(engine: Any) -> None:
    """ZeRO's inner optimizer makes its moments in its first step; a checkpoint is put back before that."""
    import torch

    zero = engine.optimizer
    flats = zero.fp32_partitioned_groups_flat if engine.zero_optimization_stage() == 3 else zero.single_partition_of_fp32_groups
    for flat in flats:
        zero.optimizer.state[flat] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    if engine.zero_optimization_stage() < 3:
        zero._lazy_init_hp_params_optimizer_state()
