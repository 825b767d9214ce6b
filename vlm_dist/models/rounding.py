"""Weights rounded to NF4 and back, as loading for training does it; for a merge."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vlm_dist.families import Family
from vlm_dist.models.experts import expert_weights
from vlm_dist.models.load import nf4_config
from vlm_dist.upstream.bitsandbytes import unpack_across_rows

if TYPE_CHECKING:
    import torch


def quantised(model: Any, family: Family, kept: Iterable[str]) -> set[str]:
    """Paths of the modules and of the experts' weights that loading in NF4 quantises, by the loader's own rules; changes the model (of
    meta tensors) on the way."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    from vlm_dist.models.experts_nf4 import experts_in_4bit

    with experts_in_4bit():
        quantizer: Any = AutoHfQuantizer.from_config(nf4_config(family, torch.float32, kept), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    experts = {name for name in expert_weights(model) if quantizer.param_needs_quantization(model, name)}
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)} | experts


def round_to_nf4(weight: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NF4 and back, as loading for training does it."""
    from bitsandbytes import functional

    unpack_across_rows()
    codes, state = functional.quantize_4bit(weight.to(device, dtype).contiguous(), compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(codes, state).cpu()


def dequantise(codes: torch.Tensor, statistics: dict[str, torch.Tensor], key: str, dtype: torch.dtype) -> torch.Tensor:
    """A weight that is stored in 4 bit, as the training met it."""
    from bitsandbytes import functional

    unpack_across_rows()
    state = functional.QuantState.from_dict({name.removeprefix(key + "."): value for name, value in statistics.items()}, codes.device)
    state.dtype = dtype
    return functional.dequantize_4bit(codes, state)
