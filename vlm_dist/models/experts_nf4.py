"""Experts in NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314): quantised while they are loaded, expert by expert.

bitsandbytes quantises linear layers only; transformers holds the experts of a layer as one weight [E, X, Y]. The numbers are those that
bitsandbytes would give the whole of it: two weights a byte, a byte for the scale of 64 of them, a float32 for the scale of 256 such:
4.127 bits a weight. The packed weight is one tensor of the computing type, so that ZeRO-3 can shard it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Params4bit
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from vlm_dist.errors import ModelError
from vlm_dist.models.experts import WEIGHTS
from vlm_dist.upstream.transformers import is_experts, nf4_quantiser

BLOCK, OUTER_BLOCK = 64, 256


def quantise_experts(weight: torch.Tensor, name: str = "weight") -> Params4bit:
    """[E, X, Y] -> packed, on the same device, with its `quant_state`. Beside the result: one expert.

    Raises:
        ModelError: an expert's weights are no multiple of a block, so that blocks would reach over two experts.
    """
    experts, size = len(weight), weight[0].numel()
    if size % BLOCK:
        raise ModelError(
            f"model.load_in_4bit: the experts of '{name}' have {tuple(weight.shape[1:])} weights each, no multiple of the {BLOCK} that "
            "share a scale in NF4; add their path to model.keep_16bit"
        )
    codes = torch.zeros((experts, size // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.zeros((experts, size // BLOCK), dtype=torch.float32, device=weight.device)
    for number, one in enumerate(weight):
        packed, state = functional.quantize_4bit(one.contiguous(), blocksize=BLOCK, quant_type="nf4")
        codes[number], scales[number] = packed.flatten(), state.absmax
    offset = scales.mean()
    absmax, outer = functional.quantize_blockwise(scales.flatten() - offset, blocksize=OUTER_BLOCK)
    state = functional.QuantState(
        absmax=absmax, shape=weight.shape, code=state.code, blocksize=BLOCK, quant_type="nf4", dtype=weight.dtype, offset=offset,
        state2=outer,
    )  # fmt: skip
    return packed_weight(codes.flatten().view(weight.dtype).unsqueeze(1), state)


def packed_weight(data: torch.Tensor, state: Any) -> Params4bit:
    """A parameter like bitsandbytes' own, of numbers that are packed already."""
    return Params4bit(data, quant_state=state, quant_type="nf4", quant_storage=data.dtype, bnb_quantized=True)


def is_quantised(model: Any, name: str, skip: list[str] | None) -> bool:
    """Whether loading in 4 bit packs this parameter as experts' weights."""
    module, leaf = get_module_from_name(model, name)
    return leaf in WEIGHTS and is_experts(module) and should_convert_module(name.rpartition(".")[0], skip)


class Quantiser(Bnb4BitHfQuantizer):
    """transformers' loading in 4 bit, of experts too."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        of_linear = super().param_needs_quantization(model, param_name, **kwargs)
        return of_linear or is_quantised(model, param_name, self.modules_to_not_convert)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(super().get_quantize_ops())


class _Quantise(ConversionOps):
    def __init__(self, of_linear: Any):
        self.of_linear = of_linear

    def convert(self, input_dict: dict[str, Any], model: Any = None, **options: Any) -> dict[str, torch.Tensor]:
        found = {}
        for name, value in input_dict.items():
            module, _ = get_module_from_name(model, name)
            if not is_experts(module):
                found |= self.of_linear.convert({name: value}, model=model, **options)
                continue
            weight = value[0] if isinstance(value, list) else value
            found[name] = quantise_experts(weight, name)
            found[name].expected = model.get_parameter(name).shape  # what config.json says; compared when all is loaded
        return found


def experts_in_4bit() -> AbstractContextManager[None]:
    """Inside, transformers' loading in 4 bit packs experts too."""
    return nf4_quantiser(Quantiser)
