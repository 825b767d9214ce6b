"""A model as training would hold it, of tensors without data: built from its config.json alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlm_dist.config import Config
from vlm_dist.families import Family
from vlm_dist.models.adapters import find_adapter, put_on_shapes
from vlm_dist.models.checkpointing import checkpoint_gradients
from vlm_dist.models.experts import balance_weight, expert_weights, of_experts, use_our_experts
from vlm_dist.models.experts_nf4 import is_quantised
from vlm_dist.models.held import weights_in_words
from vlm_dist.models.load import kept_in_16bit, nf4_config
from vlm_dist.models.lora import add_lora, freeze_sides, trained_whole
from vlm_dist.models.modes import hold_frozen
from vlm_dist.models.patching import patch_model
from vlm_dist.models.patching_lengths import attend_by_lengths
from vlm_dist.models.sequence import SequenceCut
from vlm_dist.models.shared_pictures import share_rows
from vlm_dist.planning.shapes import Shapes
from vlm_dist.upstream.bitsandbytes import keep_nf4_layout
from vlm_dist.upstream.torch import disable_modes, own_buffers, own_parameters

BLOCK, OUTER_BLOCK = 64, 256  # of bitsandbytes' NF4 with double quantisation
CODES, OUTER_CODES = 16, 256


def build_twin(config: Config, hf_config: Any, family: Family, dtype: torch.dtype, shapes: Shapes) -> Any:
    """What `load_trainable` would give, and `start_engine` would train: NF4, adapters, kernels, checkpointing; what trains in float32.
    Call it inside `counting`."""
    with disable_modes(), torch.device("meta"):
        model = skeleton(config, hf_config, family, dtype)
        checkpoint_gradients(model, family, config.model.gradient_checkpointing)
        packs = config.data.packing and family.packs
        attend_by_lengths(model, family, config.model.attn_implementation, packs=packs, on_gpu=shapes.on_gpu, dtype=dtype)
        if (number := config.engine.sequence_parallel) > 1:
            cut = SequenceCut(number, number - 1)  # the last part of a row has most of the answers
            share_rows(model, family, cut, cached=config.data.cache_features)
        kernels = "all" if config.kernels == "auto" and shapes.on_gpu else config.kernels
        patch_model(model, kernels, balances=bool(balance_weight(model, config)))
    _give_shapes(model, dtype)
    return hold_frozen(model).train()


def weights_of_twin(config: Config, hf_config: Any, family: Family, dtype: torch.dtype) -> list[str]:
    """What training will say of weights that stay in 16 bit or have no adapter."""
    with torch.device("meta"):
        model = skeleton(config, hf_config, family, dtype)
    return weights_in_words(model, str(dtype).removeprefix("torch."))


def adapts_experts(config: Config, hf_config: Any, family: Family, dtype: torch.dtype) -> bool:
    """Whether the model has experts, and they would get adapters."""
    with torch.device("meta"):
        model = skeleton(config, hf_config, family, dtype)
    return any(of_experts(name) and parameter.requires_grad for name, parameter in model.named_parameters())


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """As DeepSpeed's torch_autocast, which training uses in 16 bit."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        yield


def skeleton(config: Config, hf_config: Any, family: Family, dtype: torch.dtype) -> Any:
    """Modules and adapters on the meta device, by the very calls that training makes."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    attention = "sdpa" if config.model.attn_implementation in ("auto", "varlen", "flash_attention_2") else config.model.attn_implementation
    with no_init_weights():
        model = AutoModelForImageTextToText.from_config(
            hf_config, dtype=dtype, attn_implementation=attention, trust_remote_code=config.model.trust_remote_code
        )
    model.tie_weights()
    use_our_experts(model)
    if config.model.load_in_4bit:
        settings = nf4_config(family, dtype, kept_in_16bit(config.model, family, trained_whole(family, config.lora) if config.lora else ()))
        replace_with_bnb_linear(model, settings.llm_int8_skip_modules, settings)
        packed = {
            name: weight for name, weight in expert_weights(model).items() if is_quantised(model, name, settings.llm_int8_skip_modules)
        }
        for weight in packed.values():
            weight.packs = True
        model.is_loaded_in_4bit = True
    adapter = find_adapter(config.model.name) if config.model.name is not None else None
    if adapter is not None:
        return put_on_shapes(model, adapter)
    if config.lora is not None:
        return add_lora(model, family, config.lora)
    freeze_sides(model, family, config.model.freeze)
    return model


def _give_shapes(model: Any, dtype: torch.dtype) -> None:
    """Fake tensors in place of those on the meta device; what trains in float32, 4-bit weights in the size that bitsandbytes gives them."""
    from bitsandbytes.nn.modules import Linear4bit

    made: dict[int, torch.nn.Parameter] = {}  # weights that two modules share stay one
    for module in model.modules():
        for name, parameter in own_parameters(module).items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                trains = parameter.requires_grad
                if isinstance(module, Linear4bit) and name == "weight":
                    made[id(parameter)] = _packed(torch.Size((module.out_features, module.in_features)), dtype)
                elif getattr(parameter, "packs", False):
                    made[id(parameter)] = _packed(parameter.shape, dtype)
                else:
                    loaded = dtype if isinstance(module, Linear4bit) else parameter.dtype  # a new layer's bias is in float32
                    number = torch.empty(parameter.shape, dtype=torch.float32 if trains else loaded)
                    made[id(parameter)] = torch.nn.Parameter(number, requires_grad=trains)
            own_parameters(module)[name] = made[id(parameter)]
        for name, buffer in own_buffers(module).items():
            if buffer is not None:
                own_buffers(module)[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    keep_nf4_layout(model)


def _packed(shape: torch.Size, dtype: torch.dtype) -> torch.nn.Parameter:
    """Two weights a byte, a byte for the scale of 64, a float32 for the scale of 256 such, in the storage type `dtype`."""
    from bitsandbytes.functional import QuantState

    number = shape.numel()
    blocks = -(-number // BLOCK)
    storage = torch.empty((-(-number // 2)) // dtype.itemsize, 1, dtype=dtype)
    weight: Any = torch.nn.Parameter(storage, requires_grad=False)
    scales = torch.empty(-(-blocks // OUTER_BLOCK))
    outer = QuantState(absmax=scales, code=torch.empty(OUTER_CODES), blocksize=OUTER_BLOCK, dtype=torch.float32)
    weight.quant_state = QuantState(
        absmax=torch.empty(blocks).to(torch.uint8), shape=shape, code=torch.empty(CODES),
        blocksize=BLOCK, quant_type="nf4", dtype=dtype, offset=torch.empty(()), state2=outer,
    )  # fmt: skip
    weight.compress_statistics, weight.quant_type = True, "nf4"
    return weight
