"""Experts in NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314): quantised while they are loaded, expert by expert.

bitsandbytes quantises linear layers only; transformers holds the experts of a layer as one weight [E, X, Y]. The numbers are those that
bitsandbytes would give the whole of it: two weights a byte, a byte for the scale of 64 of them, a float32 for the scale of 256 such:
4.127 bits a weight. The packed weight is one tensor of the computing type, so that ZeRO-3 can shard it. `save_pretrained` stores them
under bitsandbytes' names (`experts.down_proj`, `experts.down_proj.absmax`, ...), and loading reads them back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Params4bit
from safetensors import safe_open
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from vlm_dist.errors import ModelError
from vlm_dist.models.experts import WEIGHTS, expert_modules, expert_weights
from vlm_dist.upstream.transformers import forget_conversions, is_experts, nf4_quantiser

BLOCK, OUTER_BLOCK = 64, 256
STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
PACKED = re.compile(rf"\.experts\.({'|'.join(WEIGHTS)})\.absmax$")
ONE_BY_ONE = re.compile(r"\.experts\.\d+\.\w+\.weight\.absmax$")


def quantise_experts(weight: torch.Tensor, name: str = "weight") -> Params4bit:
    """[E, X, Y] -> packed, on the same device, with its `quant_state`. Beside the result: one expert.

    Raises:
        ModelError: an expert's weights are no multiple of a block, so that blocks would reach over two experts.
    """
    check_blocks(weight.shape, name)
    experts, size = len(weight), weight[0].numel()
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


def check_blocks(shape: torch.Size, name: str) -> None:
    """
    Raises:
        ModelError: an expert's weights are no multiple of a block, so that blocks would reach over two experts.
    """
    if shape[1:].numel() % BLOCK:
        raise ModelError(
            f"model.load_in_4bit: the experts of '{name}' have {tuple(shape[1:])} weights each, no multiple of the {BLOCK} that share a "
            "scale in NF4; add their path to model.keep_16bit"
        )


def packed_weight(data: torch.Tensor, state: Any) -> Params4bit:
    """A parameter like bitsandbytes' own, of numbers that are packed already."""
    return Params4bit(data, quant_state=state, quant_type="nf4", quant_storage=data.dtype, bnb_quantized=True)


def is_quantised(model: Any, name: str, skip: list[str] | None) -> bool:
    """Whether loading in 4 bit packs this parameter as experts' weights."""
    module, leaf = get_module_from_name(model, name)
    return leaf in WEIGHTS and is_experts(module) and should_convert_module(name.rpartition(".")[0], skip)


class Quantiser(Bnb4BitHfQuantizer):
    """transformers' loading in 4 bit, of experts too."""

    stored_packed = False
    """Whether the checkpoint holds its experts in 4 bit."""

    def preprocess_model(self, model: Any, dtype: Any = None, **options: Any) -> None:
        super().preprocess_model(model, dtype=dtype, **options)
        if not self.pre_quantized:
            for name, weight in expert_weights(model).items():
                if self.param_needs_quantization(model, name):
                    check_blocks(weight.shape, name)
        self.stored_packed = self.pre_quantized and _stores_packed(options.get("checkpoint_files") or ())

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Of a checkpoint that holds packed experts: they are read as they are, in place of the architecture's own rules for them."""
        found = super().update_weight_conversions(weight_conversions, model)
        if not self.stored_packed:
            return found
        return [rule for rule in found if not is_of_experts(rule)] + [_reading(name, self) for name in WEIGHTS]

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


class _Read(ConversionOps):
    """Codes and statistics of a packed weight, as they are stored, to the weight."""

    def __init__(self, hf_quantizer: Any):
        self.hf_quantizer = hf_quantizer  # its presence keeps transformers from changing the number types

    def convert(
        self, input_dict: dict[str, Any], target_patterns: Any = None, full_layer_name: str = "", model: Any = None, **_: Any
    ) -> Any:
        (target,) = target_patterns
        held = {_plain(name).removeprefix(target + "."): value[0] for name, value in input_dict.items()}
        codes = held.pop(target)
        weight = packed_weight(codes, functional.QuantState.from_dict(held, codes.device))
        weight.expected = model.get_parameter(full_layer_name).shape
        return {target: weight}


def _reading(name: str, quantiser: Quantiser) -> WeightConverter:
    target = f".experts.{name}"
    names = [target, *(f"{target}.{statistic}" for statistic in STATISTICS)]
    return WeightConverter([one.replace(".", r"\.") for one in names], target, [_Read(quantiser)])


def _plain(pattern: str) -> str:
    return pattern.replace("\\", "")


def is_of_experts(rule: Any) -> bool:
    """Whether a rule of loading makes weights of experts."""
    return any(_plain(target).rpartition(".")[2] in WEIGHTS for target in rule.target_patterns)


def _reads_packed(rule: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(rule, "operations", ()))


def _stores_packed(files: Iterable[Any]) -> bool:
    """Whether these files hold experts in 4 bit.

    Raises:
        ModelError: each by itself, as transformers 4 did.
    """
    packed = False
    for file in files:
        with safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118
                if ONE_BY_ONE.search(key):
                    raise ModelError(
                        f"model.name: the checkpoint holds each expert by itself in 4 bit ('{key.removesuffix('.absmax')}'), as "
                        "transformers 4 made them, which cannot be put together; give the 16-bit checkpoint that it was made from"
                    )
                packed = packed or PACKED.search(key) is not None
    return packed


def let_save(model: Any) -> None:
    """`save_pretrained` of a model in 4 bit stores packed experts with their statistics, under the model's own names; and does not want to
    change back what was read packed, which transformers 5.23 cannot."""
    found = [module for module in expert_modules(model).values() if hasattr(module.down_proj, "quant_state")]
    for module in found:
        module.register_state_dict_post_hook(_add_statistics)
    forget_conversions(model, lambda rule: _reads_packed(rule) or bool(found and is_of_experts(rule)))


def _add_statistics(module: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in WEIGHTS:
        if (state := getattr(getattr(module, name, None), "quant_state", None)) is not None:
            for key, value in state.as_dict(packed=True).items():
                state_dict[f"{prefix}{name}.{key}"] = value.detach()


def experts_in_4bit() -> AbstractContextManager[None]:
    """Inside, transformers' loading in 4 bit packs experts too."""
    return nf4_quantiser(Quantiser)
