"""The fullest micro-batch, once, before training: too little memory shows in the first minute and not in the ninth hour."""

from __future__ import annotations

from vlm_dist.data.encoded import count_patches
from vlm_dist.deepspeed_config import zero_stage
from vlm_dist.distributed import Ranks
from vlm_dist.inputs.opened import Inputs
from vlm_dist.inputs.workload import micro_batch
from vlm_dist.models.ahead import ahead_rule, placed
from vlm_dist.models.generate import autocast
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.modes import buffers_kept
from vlm_dist.models.shared_rows import cutting
from vlm_dist.planning.memory import optimizer_bytes
from vlm_dist.training.outcome import peak_memory
from vlm_dist.training.prepare import Loaded

WHOLE = 2  # the highest ZeRO stage at which every rank holds the whole model


def rehearse(inputs: Inputs, loaded: Loaded, ranks: Ranks) -> str:
    """Compute it forward and backward, with room taken for the optimizer; nothing of it stays.

    Returns:
        What it took, in words; nothing where it was not done.

    Raises:
        torch.OutOfMemoryError: it does not fit; the trainer says what would help.
    """
    import torch

    config = inputs.config
    stage = zero_stage(config, ranks.world_size)
    wanted = ranks.device.type == "cuda" if config.health.rehearse == "auto" else config.health.rehearse
    if not wanted or stage > WHOLE or config.engine.offload != "none":
        return ""
    rows = config.training.micro_batch
    model = loaded.model.to(ranks.device)
    batch = placed(ahead_rule(model)(micro_batch(inputs.encoder, inputs.workload, rows, multiple=ranks.sharing)), ranks.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    moments = torch.empty(optimizer_bytes([parameter.numel() for parameter in parameters], config.optim.name), dtype=torch.uint8,
                          device=ranks.device)  # fmt: skip
    was_training = model.training
    model.train()
    try:
        for _ in range(min(2, config.training.global_batch // (rows * ranks.replicas))):  # the second meets the gradients of the first
            with cutting(model):
                with autocast(model), buffers_kept(model):
                    loss = summed_loss(model, batch)
                loss.backward()
        peak = peak_memory(ranks)
    finally:
        for parameter in parameters:
            parameter.grad = None
        model.train(was_training)
        del moments
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(ranks.device)
    used = f"{peak / 1e9:.2f}"
    if ranks.device.type == "cuda":
        used += f" of {torch.cuda.get_device_properties(ranks.device).total_memory / 1e9:.2f}"
    return f"rehearsed the fullest micro-batch ({batch['input_ids'].numel():,} tokens, {count_patches(batch):,} patches): {used} GB"
