"""transformers: counts of picture tokens, options of processors, its tables of architectures, the attention that a model has chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

SEEN = "5.23.0"
NAMES = (
    "transformers.ProcessorMixin",
    "transformers.ProcessorMixin._merge_kwargs",
    "transformers.LlavaProcessor._get_num_multimodal_tokens",
    "transformers.Qwen2_5_VLProcessor._get_num_multimodal_tokens",
    "transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES",
    "transformers.AutoModelForImageTextToText._model_mapping",
    "transformers.AutoModelForCausalLM._model_mapping",
    "transformers.PretrainedConfig._attn_implementation",
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


def merge_options_once(processor: Any) -> None:
    """Let a processor sort its options by what they are for (text, pictures) once for each set of them, not for every sample, which takes
    as long as tokenising. Its attributes must not change afterwards."""
    processor._merge_kwargs = partial(_merged, processor._merge_kwargs, {})


def _merged(merge: Callable[..., dict[str, Any]], known: dict[Any, dict[str, Any]], *kinds: Any, **options: Any) -> dict[str, Any]:
    """What `merge` gives, as dicts that may be changed."""
    given = {name: value for name, value in options.items() if name != "tokenizer_init_kwargs"}  # those of one tokenizer
    key = (kinds, tuple(sorted(given.items())))
    if not all(isinstance(value, str | bool | int | None) for value in given.values()):
        return merge(*kinds, **options)
    if key not in known:
        known[key] = merge(*kinds, **options)
    return {name: dict(value) if isinstance(value, dict) else value for name, value in known[key].items()}
