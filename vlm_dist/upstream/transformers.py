"""transformers: a processor's count of picture tokens, its tables of architectures, attention and experts that a model has
chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SEEN = "5.23.0"
NAMES = (
    "transformers.ProcessorMixin",
    "transformers.LlavaProcessor._get_num_multimodal_tokens",
    "transformers.Qwen2_5_VLProcessor._get_num_multimodal_tokens",
    "transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES",
    "transformers.AutoModelForImageTextToText._model_mapping",
    "transformers.AutoModelForCausalLM._model_mapping",
    "transformers.PretrainedConfig._attn_implementation",
    "transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextExperts._apply_gate",
    "transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING",
)


def picture_token_rule(processor: Any) -> Callable[[int, int], int] | None:
    """(width, height) of a picture -> its tokens, by the processor's own arithmetic; None: it has none."""
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None:
        return None
    return lambda width, height: count(image_sizes=[(height, width)])["num_image_tokens"][0]


def model_types_of(processor: Any) -> list[str]:
    """The architectures that come with a processor of this class; several may."""
    from transformers.models.auto import processing_auto

    names = processing_auto.PROCESSOR_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]
    return [model_type for model_type, name in names.items() if name == type(processor).__name__]


def takes_pictures(hf_config: Any) -> bool:
    """Whether transformers has an image-text-to-text model for this configuration."""
    from transformers import AutoModelForImageTextToText

    return type(hf_config) in AutoModelForImageTextToText._model_mapping


def writes_text(hf_config: Any) -> bool:
    """Whether it has a causal language model for it."""
    from transformers import AutoModelForCausalLM

    return type(hf_config) in AutoModelForCausalLM._model_mapping


def attention_of(hf_config: Any) -> str:
    """The attention implementation that a model was loaded with; empty where none was chosen."""
    return hf_config._attn_implementation or ""


def is_experts(module: Any) -> bool:
    """Whether a module holds the experts of a layer and computes by name of an implementation (`use_experts_implementation`)."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "_apply_gate")


def register_experts(name: str, function: Callable) -> None:
    """Add an implementation of experts to transformers' table."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, function)


def apply_gate(module: Any, gate_and_up: Any) -> Any:
    """What experts compute between their two products, from both halves of the first."""
    return module._apply_gate(gate_and_up)


@contextmanager
def nf4_quantiser(kind: type) -> Iterator[None]:
    """While models are loaded in 4 bit, `kind` (a Bnb4BitHfQuantizer) puts them there."""
    from transformers.quantizers import auto

    of_library = auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = kind
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = of_library


def routers_with_logits(model: Any) -> list[tuple[Any, int]]:
    """The modules that choose among experts and give out their logits, and where among their outputs these are."""
    recorders = {}
    for module in model.modules():
        found = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if found is not None and hasattr(found, "target_class"):
            recorders[found.target_class] = found.index
    return [(module, recorders[type(module)]) for module in model.modules() if type(module) in recorders]
