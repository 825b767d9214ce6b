"""The DeepSpeed engine: started without a launcher too, stepped, and read from.

Number types: frozen weights are held in model.dtype, trainable weights in float32, and in 16 bit the computation runs under DeepSpeed's
`torch_autocast` (in float16 with a scaled loss: loss_scale.py). So the optimizer's weights are the master weights at every ZeRO stage.
"""

from __future__ import annotations

import math
import os
import tempfile
from typing import TYPE_CHECKING, Any

from vlm_dist import distributed
from vlm_dist.checkpoints.snapshot import trainable
from vlm_dist.config import Config
from vlm_dist.deepspeed_config import deepspeed_config
from vlm_dist.distributed import Ranks
from vlm_dist.errors import MachineError, UserError
from vlm_dist.families import Family
from vlm_dist.models.experts_lora import gather_with_experts
from vlm_dist.models.patching_nf4 import keep_apart
from vlm_dist.training.compiling import wait_for_compilation
from vlm_dist.training.optim import build_optimizer
from vlm_dist.upstream.deepspeed import forget_autocast, shape_of, skip_shared_memory_op, widen

if TYPE_CHECKING:
    import torch


def start_engine(model: torch.nn.Module, family: Family, config: Config, dtype: torch.dtype, ranks: Ranks) -> Any:
    """Wrap the model in a DeepSpeed engine; trainable weights become float32."""
    import deepspeed

    from vlm_dist.upstream.torch import let_collectives_wait

    skip_shared_memory_op()
    forget_autocast()
    if config.engine.nvme_path is not None:
        _check_nvme(config.engine.nvme_path)
    for parameter in model.parameters():
        if parameter.requires_grad:
            widen(parameter)
    number = sum(math.prod(shape_of(p)) for p in model.parameters() if p.requires_grad)
    engine, *_ = deepspeed.initialize(
        model=model.to(ranks.device),
        optimizer=build_optimizer(model, config.optim, family, on_cpu=config.engine.offload != "none"),
        config=deepspeed_config(config, ranks.world_size, dtype, number, on_gpu=ranks.device.type == "cuda"),
    )
    if ranks.world_size > 1:  # longer than the watchdog, which names who is waited for
        seconds = distributed.NEVER_S if config.health.timeout_s is None else 2 * config.health.timeout_s
        let_collectives_wait(seconds, but=distributed.patient_group())
    gather_with_experts(model)
    if engine.zero_optimization_stage() == 3:
        keep_apart(model)
        _announce_reads(model)
    engine.train()
    return engine


def _announce_reads(model: torch.nn.Module) -> None:
    """A kernel that computes for several modules at once reads weights of modules that it does not call; ZeRO-3 gathers them around the
    call of the one that it was put into, in `generate` too, which goes round the hooks of the whole model."""
    import deepspeed

    for module in model.modules():
        for parameter in getattr(module, "reads_weights", list)():
            deepspeed.zero.register_external_parameter(module, parameter)


def _check_nvme(path: str) -> None:
    """Write and read a block as DeepSpeed will.

    Raises:
        MachineError: DeepSpeed's asynchronous I/O cannot be compiled here, or cannot use the folder.
    """
    import torch
    from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]

    if not os.access(path, os.W_OK):
        raise MachineError(f"engine.nvme_path: '{path}' is no folder that can be written; make it, or give another")
    block, back = torch.ones(1 << 18), torch.zeros(1 << 18)
    try:
        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise MachineError("engine.nvme_path: DeepSpeed's asynchronous I/O needs libaio (on Debian: apt-get install libaio-dev)")
        wait_for_compilation("async_io")
        with tempfile.NamedTemporaryFile(dir=path) as file:
            handle = AsyncIOBuilder().load(verbose=False).aio_handle(1 << 20, 8, False, True, 1)
            handle.sync_pwrite(block, file.name, 0)
            handle.sync_pread(back, file.name, 0)
    except UserError:
        raise
    except Exception as error:  # the compiler, nvcc that is missing or of another CUDA, and the handle each have their own
        what = (str(error).strip() or type(error).__name__)[-300:].replace("\n", " ")
        raise MachineError(
            f"engine.nvme_path: DeepSpeed's asynchronous I/O does not work here: {what}; it is compiled at first use, with g++ and, "
            "on a GPU, nvcc of torch's CUDA version (CUDA_HOME)"
        ) from None
    if not torch.equal(block, back):
        raise MachineError(f"engine.nvme_path: asynchronous I/O cannot write or read files in '{path}'; give a folder of another disk")


def set_learning_rate(engine: Any, lr: float) -> None:
    """Each side gets its share of `lr`."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def take_step(engine: Any, grad_clip: float, loss_scale: float = 1.0) -> float:
    """End a micro-batch: on the last of an optimizer step, clip and update, unless the gradient is not finite somewhere.

    Args:
        loss_scale: what the losses were multiplied by (ZeRO's optimizers know by themselves).

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
    if loss_scale != 1.0:
        for parameter in trainable(engine).values():
            if parameter.grad is not None:
                parameter.grad /= loss_scale
    norm = float(torch.nn.utils.clip_grad_norm_(trainable(engine).values(), grad_clip or float("inf")))
    if not math.isfinite(norm):
        for parameter in trainable(engine).values():
            parameter.grad = None  # the optimizer passes over it
    engine.step()
    return norm if math.isfinite(norm) else math.nan
