"""The DeepSpeed JSON of a configuration, and what it decides: rounds of accumulation, ZeRO stage, offloading."""

from __future__ import annotations

from typing import Any

from vlm_dist.config import Config
from vlm_dist.errors import ConfigError

OWNED_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer",
    "scheduler", "bf16", "fp16", "torch_autocast",
)  # fmt: skip
LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's own default


def zero_stage(config: Config, world_size: int) -> int:
    """The ZeRO stage (Rajbhandari et al. 2019, arXiv:1910.02054) that a configuration means on so many ranks. auto: what is offloaded
    needs one; adapters are small, and stage 0 sends the least (docs/scaling.md); every weight's optimizer state is worth sharding."""
    engine = config.engine
    if engine.zero_stage != "auto":
        return engine.zero_stage
    if engine.offload == "all" or engine.nvme_path is not None:
        return 3
    return 2 if engine.offload == "optimizer" or (world_size > 1 and config.lora is None) else 0


def loads_sharded(config: Config, world_size: int) -> bool:
    """Whether each rank holds only its share of the weights while they are loaded. DoRA measures whole weights when it begins, and an NVMe
    disk takes them from the engine."""
    dora = config.lora is not None and config.lora.dora
    return zero_stage(config, world_size) == 3 and not dora and config.engine.nvme_path is None


def replicas(config: Config, world_size: int) -> int:
    """How many ranks, or groups of ranks that share rows (engine.sequence_parallel), have rows of their own.

    Raises:
        ConfigError: the ranks cannot be put into such groups.
    """
    sharing = config.engine.sequence_parallel
    if world_size % sharing:
        raise ConfigError(
            f"engine.sequence_parallel={sharing}: {world_size} ranks cannot be put into groups of {sharing}; start a multiple of it"
        )
    return world_size // sharing


def check_batches(config: Config, world_size: int) -> int:
    """Accumulation rounds per optimizer step.

    Raises:
        ConfigError: global_batch cannot be cut into micro-batches for so many ranks.
    """
    training, world_size = config.training, replicas(config, world_size)
    if training.global_batch % (training.micro_batch * world_size):
        fits = training.micro_batch * world_size
        nearest = max(fits, round(training.global_batch / fits) * fits)
        raise ConfigError(
            f"training.global_batch={training.global_batch} is not a multiple of micro_batch x ranks = "
            f"{training.micro_batch} x {world_size}{_grouped(config)}; use {nearest}, or another micro_batch"
        )
    return training.global_batch // (training.micro_batch * world_size)


def _grouped(config: Config) -> str:
    sharing = config.engine.sequence_parallel
    return f" (groups of {sharing}, engine.sequence_parallel)" if sharing > 1 else ""


def deepspeed_config(
    config: Config, world_size: int, dtype: Any, num_trainable: int = LARGEST_BUCKET, *, on_gpu: bool = False
) -> dict[str, Any]:
    """The DeepSpeed JSON of a configuration.

    Args:
        dtype: what is computed in (a torch.dtype, or its name).
        num_trainable: trainable parameters. DeepSpeed's bucket for their gradients is no larger: its default would take 2 GB beside
            adapters of some MB.
        on_gpu: gradients of many weights travel while others are computed, and what is offloaded lies in pinned memory.

    Raises:
        ConfigError: engine.deepspeed sets what our own keys decide, or the optimizer does not fit the stage.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    half = dtype_name in ("bfloat16", "float16")
    owned = [key for key in config.engine.deepspeed if key in OWNED_KEYS]
    if owned:
        raise ConfigError(f"engine.deepspeed.{owned[0]} is decided by this file's own keys; remove it (see `vlm-dist config --explain`)")
    stage = zero_stage(config, world_size)
    if config.engine.deepspeed.get("zero_optimization", {}).get("stage", stage) != stage:
        raise ConfigError("engine.deepspeed.zero_optimization.stage contradicts engine.zero_stage; set only engine.zero_stage")
    if config.optim.name == "adamw_8bit" and stage > 0:
        raise ConfigError(
            f"optim.name=adamw_8bit cannot be sharded (engine.zero_stage is {stage} here); use adamw, or engine.zero_stage: 0"
        )
    bucket = {"reduce_bucket_size": min(num_trainable, LARGEST_BUCKET)}
    zero = {
        "stage": stage,
        "overlap_comm": on_gpu and stage >= 2 and (config.lora is None or config.engine.offload != "none"),
        **bucket,
        **_offload(config, stage, pinned=on_gpu),
        **config.engine.deepspeed.get("zero_optimization", {}),
    }
    return {
        "train_micro_batch_size_per_gpu": config.training.micro_batch,
        "gradient_accumulation_steps": check_batches(config, world_size),
        # at stage 0 the norm is taken here (`take_step`), because DeepSpeed does not report it there
        "gradient_clipping": config.optim.grad_clip if stage else 0.0,
        # no module is safe to reduce in 16 bit: gradients are added up in the float32 of what trains
        "torch_autocast": {"enabled": half, "dtype": dtype_name if half else "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
        **config.engine.deepspeed,
        "zero_optimization": zero,
    }


def _offload(config: Config, stage: int, *, pinned: bool) -> dict[str, Any]:
    """DeepSpeed's words for engine.offload and engine.nvme_path (ZeRO-Offload, arXiv:2101.06840; ZeRO-Infinity, arXiv:2104.07857)."""
    engine = config.engine
    if engine.offload == "none":
        if engine.nvme_path is not None:
            raise ConfigError("engine.nvme_path: nothing is offloaded; set engine.offload: optimizer or all")
        return {}
    least = 3 if engine.offload == "all" or engine.nvme_path else 1
    if stage < least:
        raise ConfigError(f"engine.offload={engine.offload} needs engine.zero_stage {least} or more, it is {stage}")
    if config.optim.name != "adamw":
        raise ConfigError(
            f"engine.offload={engine.offload}: the update runs on the CPU, which optim.name={config.optim.name} cannot; use adamw"
        )
    place: dict[str, Any] = {"device": "nvme" if engine.nvme_path else "cpu", "pin_memory": pinned}
    place |= {"nvme_path": engine.nvme_path} if engine.nvme_path else {}
    return {"offload_optimizer": place} | ({"offload_param": place} if engine.offload == "all" else {})
