"""transformers: a processor's count of picture tokens, its tables of architectures, the attention that a model has chosen."""

from __future__ import annotations

from collections.abc import Callable
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
    "transformers.modeling_layers.GradientCheckpointingLayer",
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


def still_when_recomputed(layer: Any) -> None:
    """A layer in evaluation mode goes on recomputing its activations where it was told to (gradient_checkpointing), which transformers
    does in training mode only: the layer says that it trains, and what runs inside finds that it does not."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not isinstance(layer, GradientCheckpointingLayer) or not layer.gradient_checkpointing:
        return
    layer.training = True
    recompute: Any = layer._gradient_checkpointing_func
    if getattr(recompute, "is_still", False):
        return

    def still(run: Callable[..., Any], *arguments: Any) -> Any:
        def quietly(*arguments: Any) -> Any:
            trains, layer.training = layer.training, trains_inside()
            try:
                return run(*arguments)
            finally:
                layer.training = trains

        return recompute(quietly, *arguments)

    def trains_inside() -> bool:
        return any(parameter.requires_grad for parameter in layer.parameters())

    still.is_still = True  # pyright: ignore[reportFunctionMemberAccess]
    layer._gradient_checkpointing_func = still


def attention_of(hf_config: Any) -> str:
    """The attention implementation that a model was loaded with; empty where none was chosen."""
    return hf_config._attn_implementation or ""
