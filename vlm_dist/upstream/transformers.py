"""transformers: counts of picture tokens, options of processors, tables of architectures, a model's attention and experts, loading weight
by weight."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    "transformers.modeling_layers.GradientCheckpointingLayer",
    "transformers.core_model_loading.set_param_for_module",
    "transformers.core_model_loading.revert_weight_conversion",
    "transformers.modeling_utils.caching_allocator_warmup",
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


def around_recomputing(layer: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wrap the function that runs a GradientCheckpointingLayer so that it can be computed again."""
    layer._gradient_checkpointing_func = wrap(layer._gradient_checkpointing_func)


def attention_of(hf_config: Any) -> str:
    """The attention implementation that a model was loaded with; empty where none was chosen."""
    return hf_config._attn_implementation or ""


def attention_interface(name: str) -> Callable[..., Any]:
    """The function behind the name of an attention implementation."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]


def register_attention(name: str, function: Callable[..., Any], *, like: str) -> None:
    """Add an attention implementation to transformers' table, with the masks of another."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[like])


def attention_configs(model: Any) -> list[Any]:
    """The configurations that the language side's attention and masks are chosen by."""
    decoder = model.get_decoder()
    found = (model.config.get_text_config(), decoder.config, *(layer.self_attn.config for layer in decoder.layers))
    return list({id(one): one for one in found}.values())


def attend_by(hf_config: Any, name: str) -> None:
    """Let the modules that share this configuration attend by another implementation."""
    hf_config._attn_implementation = name


@contextmanager
def weight_by_weight(placed: Callable[[Any, str], None]) -> Iterator[None]:
    """Inside, `from_pretrained` reads one weight after another, in the same order everywhere, and calls `placed` with the model and the
    weight's name as soon as it is in its module. By itself it takes room for the whole model on the card first, and reads ahead in
    threads."""
    from transformers import core_model_loading, modeling_utils

    put, warm_up = core_model_loading.set_param_for_module, modeling_utils.caching_allocator_warmup
    in_threads = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")

    def put_and_tell(model: Any, name: str, *rest: Any, **options: Any) -> None:
        put(model, name, *rest, **options)
        placed(model, name)

    core_model_loading.set_param_for_module = put_and_tell
    modeling_utils.caching_allocator_warmup = lambda *_: None
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        core_model_loading.set_param_for_module, modeling_utils.caching_allocator_warmup = put, warm_up
        del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        if in_threads is not None:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = in_threads


def wants_token_types(processor: Any) -> bool:
    """Whether the model is to be told which tokens are pictures'; PaddleOCR-VL's processor does not name that among what it gives."""
    names = processor.model_input_names
    by_grid = getattr(processor, "return_mm_token_type_ids", False) and "image_grid_thw" in names
    return "mm_token_type_ids" in names or by_grid


def taken_by_generate(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A processor's tensors without types of tokens that the model's `generate` would refuse: MiniMax-M3-VL's processor gives them."""
    import inspect

    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    taken = {name for call in (whole.forward, whole.prepare_inputs_for_generation) for name in inspect.signature(call).parameters}
    return {name: tensor for name, tensor in inputs.items() if name != "mm_token_type_ids" or name in taken}


def hasten(processor: Any) -> None:
    """The same answers in less time; its attributes must not change afterwards."""
    merge_options_once(processor)
    resize_as_decoded(processor)


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


def resize_as_decoded(processor: Any) -> None:
    """Let torchvision resize a picture in the layout that decoders give (colour last in memory), from which it gets the same pixels in half
    the time; transformers lays each anew before (`process_image`). Only what is resized afterwards, and by transformers' own way."""
    from transformers.image_processing_backends import TorchvisionBackend

    theirs = processor.image_processor
    if not isinstance(theirs, TorchvisionBackend) or not theirs.do_resize:
        return
    if any(getattr(type(theirs), name) is not getattr(TorchvisionBackend, name) for name in ("process_image", "resize")):
        return
    ours = copy.copy(theirs)
    ours.process_image = partial(_as_decoded, ours.process_image)
    ours.resize = partial(_resized_in_order, ours.resize)
    processor.image_processor = ours


def _as_decoded(process: Callable[..., Any], image: Any, *rest: Any, device: Any = None, **options: Any) -> Any:
    """A picture [3, H, W] of bytes as it lies in memory."""
    is_pixels = str(getattr(image, "dtype", "")) == "torch.uint8" and image.ndim == 3 and image.shape[0] == 3
    if is_pixels and image.shape[2] > 4 and device is None:
        return image
    return process(image, *rest, device=device, **options)


def _resized_in_order(resize: Callable[..., Any], *given: Any, **options: Any) -> Any:
    return resize(*given, **options).contiguous()


def is_experts(module: Any) -> bool:
    """Whether a module holds the experts of a layer and computes by name of an implementation (`use_experts_implementation`)."""
    return hasattr(module, "_is_expert_parallel") and hasattr(type(module), "_apply_gate")  # a wrapper of PEFT hands on what it has not


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


def forget_conversions(model: Any, which: Callable[[Any], bool]) -> None:
    """Let `save_pretrained` store what these rules of loading made under the model's own names, not change it back."""
    model._weight_conversions = [rule for rule in model._weight_conversions if not which(rule)]


def routers_with_logits(model: Any) -> list[tuple[Any, int]]:
    """The modules that choose among experts and give out their logits, and where among their outputs these are."""
    recorders = {}
    for module in model.modules():
        found = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if found is not None and hasattr(found, "target_class"):
            recorders[found.target_class] = found.index
    return [(module, recorders[type(module)]) for module in model.modules() if type(module) in recorders]
