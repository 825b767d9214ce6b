"""The DeepSpeed engine: started without a launcher too, stepped, and read from.

Number types: frozen weights are held in model.dtype, trainable weights in float32, and with bfloat16 the computation runs under
DeepSpeed's `torch_autocast`. So the optimizer's weights are the master weights at every ZeRO stage.
"""

from __future__ import annotations

import math
import os
import tempfile
from typing import TYPE_CHECKING, Any

from vlm_dist.config import Config
from vlm_dist.distributed import Ranks
from vlm_dist.errors import ConfigError, MachineError
from vlm_dist.families import Family
from vlm_dist.training.optim import build_optimizer

if TYPE_CHECKING:
    import torch

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


def check_batches(config: Config, world_size: int) -> int:
    """Accumulation rounds per optimizer step.

    Raises:
        ConfigError: global_batch cannot be cut into micro-batches for so many ranks.
    """
    training = config.training
    if training.global_batch % (training.micro_batch * world_size):
        fits = training.micro_batch * world_size
        nearest = max(fits, round(training.global_batch / fits) * fits)
        raise ConfigError(
            f"training.global_batch={training.global_batch} is not a multiple of micro_batch x ranks = "
            f"{training.micro_batch} x {world_size}; use {nearest}, or another micro_batch"
        )
    return training.global_batch // (training.micro_batch * world_size)


def deepspeed_config(config: Config, world_size: int, dtype_name: str, num_trainable: int = LARGEST_BUCKET) -> dict[str, Any]:
    """The DeepSpeed JSON of a configuration.

    Args:
        num_trainable: trainable parameters. DeepSpeed's bucket for their gradients is no larger: its default would take 2 GB beside
            adapters of some MB.

    Raises:
        ConfigError: engine.deepspeed sets what our own keys decide, or the optimizer does not fit the stage.
    """
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
        "overlap_comm": False,
        **bucket,
        **_offload(config, stage),
        **config.engine.deepspeed.get("zero_optimization", {}),
    }
    return {
        "train_micro_batch_size_per_gpu": config.training.micro_batch,
        "gradient_accumulation_steps": check_batches(config, world_size),
        # at stage 0 the norm is taken here (`take_step`), because DeepSpeed does not report it there
        "gradient_clipping": config.optim.grad_clip if stage else 0.0,
        "torch_autocast": {"enabled": dtype_name == "bfloat16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
        **config.engine.deepspeed,
        "zero_optimization": zero,
    }


def _offload(config: Config, stage: int) -> dict[str, Any]:
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
    place: dict[str, Any] = {"device": "nvme" if engine.nvme_path else "cpu", "pin_memory": False}
    place |= {"nvme_path": engine.nvme_path} if engine.nvme_path else {}
    return {"offload_optimizer": place} | ({"offload_param": place} if engine.offload == "all" else {})


def start_engine(model: torch.nn.Module, family: Family, config: Config, dtype: torch.dtype, ranks: Ranks) -> Any:
    """Wrap the model in a DeepSpeed engine; trainable weights become float32."""
    import deepspeed

    _skip_shared_memory_op()
    if config.engine.nvme_path is not None:
        _check_nvme(config.engine.nvme_path)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    engine, *_ = deepspeed.initialize(
        model=model.to(ranks.device),
        optimizer=build_optimizer(model, config.optim, family, on_cpu=config.engine.offload != "none"),
        config=deepspeed_config(
            config, ranks.world_size, str(dtype).removeprefix("torch."), sum(p.numel() for p in model.parameters() if p.requires_grad)
        ),
    )
    engine.train()
    return engine


def _check_nvme(path: str) -> None:
    """Write and read a block as DeepSpeed will.

    Raises:
        MachineError: DeepSpeed's asynchronous I/O cannot be compiled here, or cannot use the folder.
    """
    import torch
    from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]

    if not os.access(path, os.W_OK):
        raise MachineError(f"engine.nvme_path: '{path}' is no folder that can be written; make it, or give another")
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise MachineError("engine.nvme_path: DeepSpeed's asynchronous I/O needs libaio (on Debian: apt-get install libaio-dev)")
    block, back = torch.ones(1 << 18), torch.zeros(1 << 18)
    try:
        with tempfile.NamedTemporaryFile(dir=path) as file:
            handle = AsyncIOBuilder().load(verbose=False).aio_handle(1 << 20, 8, False, True, 1)
            handle.sync_pwrite(block, file.name, 0)
            handle.sync_pread(back, file.name, 0)
    except (RuntimeError, OSError) as error:  # RuntimeError: of the compiler, or of the handle
        raise MachineError(f"engine.nvme_path: DeepSpeed's asynchronous I/O does not work here: {str(error)[-300:]}") from None
    if not torch.equal(block, back):
        raise MachineError(f"engine.nvme_path: asynchronous I/O cannot write or read files in '{path}'; give a folder of another disk")


def set_learning_rate(engine: Any, lr: float) -> None:
    """Each side gets its share of `lr`."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def take_step(engine: Any, grad_clip: float) -> float:
    """End a micro-batch: on the last of an optimizer step, clip and update, unless the gradient is not finite somewhere.

    Returns:
        The gradient norm over all ranks before clipping: NaN where no update was made.
    """
    import torch

    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return math.nan
    if engine.zero_optimization_stage():  # leaves out such an update by itself
        engine.step()
        return float(engine.get_global_grad_norm() or 0.0) if engine.was_step_applied() else math.nan
    norm = float(torch.nn.utils.clip_grad_norm_(trainable(engine).values(), grad_clip or float("inf")))
    if not math.isfinite(norm):
        for parameter in trainable(engine).values():
            parameter.grad = None  # the optimizer passes over it
    engine.step()
    return norm if math.isfinite(norm) else math.nan


def trainable(engine: Any) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def _skip_shared_memory_op() -> None:
    """DeepSpeed compiles a shared-memory collective for CPU ranks when it first starts: 20 s and a compiler, for a path that one GPU
    or one process never takes. It asks this table whether it may; the table itself costs a probe of every op."""
    import deepspeed.ops

    if "__compatible_ops__" not in vars(deepspeed.ops):
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010
