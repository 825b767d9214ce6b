"""One training step by the calls that training makes: load, adapt, patch, collate, forward, backward, optimizer."""

from __future__ import annotations

from typing import Any

import torch

from tests.models.test_families import SAMPLES, TEXT_ONLY, batch
from tests.pretended.launches import Launches
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.data.collate import collate_packed
from vlm_dist.data.encode import Encoder
from vlm_dist.models.ahead import ahead_rule, placed
from vlm_dist.models.checkpointing import checkpoint_gradients
from vlm_dist.models.generate import autocast
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.patching import patch_model
from vlm_dist.models.patching_lengths import attend_by_lengths
from vlm_dist.models.positions import position_rule


def one_step(
    path: str, device: torch.device, launches: Launches | None = None, *, compute: bool = False, left_behind: str = "",
    dtype: str = "float32", packed: bool = False,
) -> tuple[float, Any]:  # fmt: skip
    """(loss, model) of a step on `device`.

    Args:
        launches: of a card that is not there.
        compute: the step's kernels too, which takes minutes in Triton's interpreter; else those of the comparisons alone.
        left_behind: a planted mistake: the batch's tensor of this name stays on the CPU.
        packed: samples share a row, and attention is by their lengths.
    """
    model, processor, family = load_model(ModelConfig(name=path, dtype=dtype), path, device)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = add_lora(model, family, LoraConfig(r=4)).train()
    checkpoint_gradients(model, family, not compute)
    if packed:
        told = attend_by_lengths(model, family, "auto", packs=True, on_gpu=device.type == "cuda", dtype=getattr(torch, dtype))
        assert told == "attention: by the lengths of samples, without masks"
    patch_model(model, "all")
    if launches is not None:
        launches.compute = compute
    chosen = [SAMPLES[0]] if compute else [SAMPLES[1], TEXT_ONLY]
    encoder = Encoder(processor, 1024)
    if packed:
        row = [encoder.encode(sample) for sample in chosen]
        data = ahead_rule(model)(collate_packed([row], processor.tokenizer.pad_token_id, position_rule(model)))
        moved = placed(data, device)
    else:
        data = batch(encoder, chosen)
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in data.items()}
    moved |= {left_behind: data[left_behind]} if left_behind else {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    with autocast(model):
        loss = summed_loss(model, moved)
    loss.backward()
    optimizer.step()
    return float(loss.detach()), model
