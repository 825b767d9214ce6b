"""Qwen2.5-VL-7B in NF4 from its configuration alone: random weights, made on the card layer by layer, nothing read from a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlm_dist.config import Config
from vlm_dist.families import FAMILIES, Family


def random_model(folder: Path, device: str, *, dry: bool) -> tuple[Any, Any, Family]:
    """(model, processor, family): the weights of a linear layer in NF4, the others in bfloat16; on the CPU a tiny one.

    `folder` receives config.json and processor.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    from vlm_dist.models.load import nf4_config
    from vlm_dist.testing import tiny_checkpoint
    from vlm_dist.testing.full_size import full_size_config
    from vlm_dist.upstream.bitsandbytes import keep_nf4_layout

    path = str(tiny_checkpoint("qwen2_5_vl", folder) if dry else full_size_config("qwen2.5-vl-7b", folder))
    config = AutoConfig.from_pretrained(path)
    family = FAMILIES[config.model_type]
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        quantised = nf4_config(family, torch.bfloat16)
        replace_with_bnb_linear(model, quantised.llm_int8_skip_modules, quantised)
    torch.manual_seed(0)
    for module in model.modules():
        _fill(module, device)
    model.is_loaded_in_4bit, model.quantization_method = True, "bitsandbytes"
    keep_nf4_layout(model)
    return model.to(device), AutoProcessor.from_pretrained(path), family


def _fill(module: Any, device: str) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, parameter in list(module.named_parameters(recurse=False)):
        if not parameter.is_meta:
            continue
        number = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        number = number.normal_(std=0.02) if parameter.ndim > 1 else number.fill_(0.0 if name == "bias" else 1.0)
        if isinstance(module, Linear4bit) and name == "weight":
            number = number.view(module.out_features, module.in_features)
            weight = Params4bit(number, requires_grad=False, quant_type="nf4", quant_storage=torch.bfloat16, module=module)
            module.weight = weight.to(device)
        else:
            setattr(module, name, torch.nn.Parameter(number, requires_grad=False))


def configuration(folder: Path, *, dry: bool, **sections: Any) -> Config:
    """A run on that model; nothing of it is opened."""
    import json

    from vlm_dist.config_load import parse_config

    tree: dict[str, Any] = {
        "name": "speed", "output_dir": str(folder / "runs"), "model": {"name": str(folder), "dtype": "bfloat16"}, "lora": {"r": 16},
        "data": {"train": "unused", "max_seq_length": 192 if dry else 2048}, "training": {"steps": 15, "global_batch": 1},
        "log": {"wandb": "disabled"},
    }  # fmt: skip
    return parse_config(json.dumps({**tree, **sections}))


def trainable(model: Any, family: Family, config: Config, kernels: str, *, checkpointing: bool) -> tuple[Any, Any]:
    """(adapted model, patches): adapters in float32 beside the base, kernels as asked."""
    from vlm_dist.models.checkpointing import checkpoint_gradients
    from vlm_dist.models.lora import add_lora
    from vlm_dist.models.patching import patch_model

    assert config.lora is not None
    adapted: Any = add_lora(model, family, config.lora)
    checkpoint_gradients(adapted, family, checkpointing)
    patches = patch_model(adapted, kernels)  # type: ignore[arg-type]
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted.train(), patches


def batch_of(config: Config, processor: Any, rows: int, *, dry: bool) -> dict[str, torch.Tensor]:
    """Rows of data.max_seq_length tokens with one picture each, as the collator gives them."""
    from vlm_dist.data.encode import Encoder
    from vlm_dist.inputs.workload import assumed, micro_batch

    encoder = Encoder(processor, 100_000)
    side = 56 if dry else 896
    return micro_batch(encoder, assumed(config, encoder, (side, side), 1), rows)


def on_device(batch: dict[str, torch.Tensor], model: Any, device: str) -> dict[str, torch.Tensor]:
    """As training gives it to the model: what it would work out of the integers is worked out before, and stays where it is asked."""
    from vlm_dist.models.ahead import ahead_rule, placed

    return placed(ahead_rule(model)(batch), torch.device(device))


def packed_batch_of(config: Config, processor: Any, model: Any, *, dry: bool) -> dict[str, torch.Tensor]:
    """One row of data.max_seq_length tokens: four samples one behind the other, with a picture of a quarter of the patches each."""
    from vlm_dist.data.collate import collate_packed
    from vlm_dist.data.encode import Encoder
    from vlm_dist.inputs.workload import assumed, row_of
    from vlm_dist.models.positions import position_rule

    encoder = Encoder(processor, 100_000)
    side = 28 if dry else 448
    one = row_of(encoder, assumed(config, encoder, (side, side), 1), config.data.max_seq_length // 4)
    return collate_packed([[one] * 4], processor.tokenizer.pad_token_id, position_rule(model))
