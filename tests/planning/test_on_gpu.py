"""The plan beside what a GPU really holds."""

from __future__ import annotations

import gc
import json

import pytest
import torch

from vlm_dist.config_load import parse_config
from vlm_dist.data.encode import Encoder
from vlm_dist.inputs.workload import assumed, micro_batch
from vlm_dist.models.checkpointing import checkpoint_gradients
from vlm_dist.models.generate import autocast
from vlm_dist.models.load import load_model, read_model_config
from vlm_dist.models.lora import add_lora
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.patching import patch_model
from vlm_dist.planning.count import count_micro_batch
from vlm_dist.testing.full_size import full_size_config

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def shallow_qwen(folder) -> str:
    """Qwen2.5-VL-3B with six language layers and eight of its vision tower, random weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(full_size_config("qwen2.5-vl-3b", folder))
    config.text_config.num_hidden_layers, config.text_config.layer_types = 6, ["full_attention"] * 6
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 8, [7]
    with torch.device("cuda"):
        AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_within_ten_percent(tmp_path, kernels, checkpointing):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    gc.collect()  # what a test before it left
    before = torch.cuda.memory_allocated()
    name = shallow_qwen(tmp_path / "model")
    text = {"name": "x", "model": {"name": name, "dtype": "bfloat16", "gradient_checkpointing": checkpointing}, "kernels": kernels,
            "data": {"train": "x", "max_seq_length": 2048}, "training": {"steps": 1}}  # fmt: skip
    config = parse_config(json.dumps(text))
    device = torch.device("cuda")
    model, processor, family = load_model(config.model, name, device, lora=config.lora)
    model = add_lora(model, family, config.lora)
    checkpoint_gradients(model, family, checkpointing)
    patch_model(model, config.kernels)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    encoder = Encoder(processor, 100_000)
    batch = micro_batch(encoder, assumed(config, encoder, (896, 896), 1), 1)
    on_gpu = {key: tensor.to(device) for key, tensor in batch.items()}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with autocast(model):
        loss = summed_loss(model.train(), on_gpu)
    loss.backward()
    measured = torch.cuda.max_memory_allocated()
    counted = count_micro_batch(config, *read_model_config(config.model, name), torch.bfloat16, batch)
    held = sum(counted.weights.values()) + sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
    print(f"{kernels}, checkpointing {checkpointing}: planned {held + counted.peak:,}, measured {measured - before:,} bytes")
    assert held + counted.peak == pytest.approx(measured - before, rel=0.1)
