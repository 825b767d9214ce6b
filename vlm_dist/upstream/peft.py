"""PEFT: adapters on the experts of a layer, which transformers holds as one parameter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.lora import layer

SEEN = "0.21.2"
NAMES = (
    "peft.tuners.lora.layer.ParamWrapper._get_in_out_features",
    "peft.LoraConfig._register_custom_module",
    "peft.utils.transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN",
    "peft.utils.transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING",
)


class ParamWrapper(layer.ParamWrapper):
    """PEFT's wrapper of a parameter (it knows its own by this name), over weights that may be packed in NF4, and without the full delta
    of all experts that PEFT adds up for every forward pass: the experts themselves are handed the adapters."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int] | tuple[None, None]:
        state = getattr(self.get_param(), "quant_state", None)
        if state is None:
            return super()._get_in_out_features(module)
        self.num_experts, first, second = state.shape
        self._param_ndim = 3
        return first, second

    def wrappers(self) -> list[ParamWrapper]:
        """This one and those inside it: one for each parameter of the same module."""
        inner = self.base_layer
        return [self, *(inner.wrappers() if isinstance(inner, ParamWrapper) else ())]

    def factors(self) -> dict[str, list[tuple[Any, Any, float]]]:
        """By parameter (A [E R, I], B [O, R E], scaling) of each adapter that is active."""
        return {
            one.parameter_name: [
                (one.lora_A[name].weight, one.lora_B[name].weight, one.scaling[name]) for name in one.active_adapters if name in one.lora_A
            ]
            for one in self.wrappers()
        }

    def forward(self, x: Any, *arguments: Any, **options: Any) -> Any:
        experts = self.get_base_layer()
        experts.adapters = {} if self.disable_adapters or self.merged else self.factors()
        try:
            return experts(x, *arguments, **options)
        finally:
            del experts.adapters


def wrap_experts(config: Any, kinds: Iterable[type]) -> None:
    """Let adapters on modules of these classes be ours; nothing of it is written into adapter_config.json."""
    config._register_custom_module(dict.fromkeys(kinds, ParamWrapper))


def taken_for_experts(model_type: str) -> set[str]:
    """Names of linear layers that PEFT, whenever it loads an adapter for this architecture, takes for experts of transformers 4: it puts
    adapters on the experts in place of any such layer (a dense MLP, shared experts, the vision tower), so that these can have none."""
    from peft.utils import transformers_weight_conversion as conversion

    return set(conversion._MOE_TARGET_MODULE_MAPPING.get(conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type, ""), {}))
