"""A checkpoint (folder or hub id) -> model, processor and its row in the families table."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.errors import MachineError, ModelError
from vlm_dist.families import Family
from vlm_dist.models.experts import NEVER_IN_4BIT, expert_weights, use_our_experts
from vlm_dist.models.introspect import find_family
from vlm_dist.models.lora import trained_whole
from vlm_dist.models.processor import check_vocabulary, load_processor
from vlm_dist.models.source import check_source, not_loadable
from vlm_dist.upstream.bitsandbytes import compute_in, keep_nf4_layout, unpack_across_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

    from vlm_dist.models.sharded import Sharding

logger = logging.getLogger(__name__)
STORED_IN_4BIT = "bitsandbytes, 4 bit"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`, `bfloat16`, `float16` or `float32` -> torch dtype for this device.

    Raises:
        MachineError: bfloat16 was asked of a GPU that has none (before compute capability 8.0).
    """
    import torch

    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        return torch.bfloat16 if has_bfloat16 else torch.float16 if device.type == "cuda" else torch.float32
    if name == "bfloat16" and device.type == "cuda" and not has_bfloat16:
        raise MachineError(
            f"model.dtype=bfloat16: this GPU ({torch.cuda.get_device_name(device)}) has no bfloat16 "
            "(it needs compute capability 8.0 or newer); use model.dtype=float16"
        )
    return getattr(torch, name)


def overflow_words(family: Family) -> str:
    """What a user of float16 is told of an architecture whose numbers are known to grow beyond it."""
    return (
        f"model.dtype=float16: '{family.model_type}' is known to compute numbers above 65,504, the largest in float16, which become "
        "infinite: its loss may be no number. Use model.dtype=float32, or a GPU with bfloat16"
    )


def read_model_config(config: ModelConfig, name: str) -> tuple[Any, Family]:
    """The checkpoint's own configuration and its family; loads no weights.

    Raises:
        ModelError: there is no such checkpoint, its architecture is not supported, or it is quantised and cannot be held as asked.
    """
    from transformers import AutoConfig

    import vlm_dist.models.mini_vlm  # noqa: F401  (registers the architecture)

    check_source(name)
    try:
        hf_config = AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except (ImportError, OSError, ValueError) as error:
        raise not_loadable(name, error) from None
    family = find_family(hf_config.model_type, hf_config, config.trust_remote_code)
    _check_quantisation(config, hf_config, name)
    return hf_config, family


def quantised_as(hf_config: Any) -> str:
    """What a checkpoint says of how its weights are stored: "bitsandbytes, 4 bit", "gptq", ...; empty for one in 16 or 32 bit."""
    found = getattr(hf_config, "quantization_config", None)
    if found is None:
        return ""
    settings = found if isinstance(found, dict) else found.to_dict()
    bits = 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else settings.get("bits")
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method") or "bitsandbytes"))
    return f"{method}, {bits} bit" if bits else method


def is_stored_in_4bit(name: str, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether a checkpoint was saved by bitsandbytes in 4 bit, and so can be held in nothing else.

    Raises:
        ModelError: as `read_model_config` does.
    """
    config = ModelConfig(name=name, revision=revision, trust_remote_code=trust_remote_code)
    return bool(quantised_as(read_model_config(config, name)[0]))


def _check_quantisation(config: ModelConfig, hf_config: Any, name: str) -> None:
    stored = quantised_as(hf_config)
    if stored and stored != STORED_IN_4BIT:
        raise ModelError(
            f"model.name: '{name}' is quantised ({stored}), and adapters train on bitsandbytes' 4 bit or on 16 bit only; "
            "give the checkpoint that it was made from"
        )
    if stored and not config.load_in_4bit:
        raise ModelError(
            f"model.load_in_4bit=false: '{name}' is quantised ({stored}), so its 16-bit weights are not there; "
            "set model.load_in_4bit: true, or give the checkpoint that it was made from"
        )


def load_model(
    config: ModelConfig, name: str, device: torch.device, *, lora: LoraConfig | None = None
) -> tuple[PreTrainedModel, ProcessorMixin, Family]:
    """The model with its weights (see `load_weights`), its processor and its family.

    Raises:
        ModelError: no such checkpoint, an unsupported architecture, or weights in pickle form.
        MachineError: the device lacks the number type.
    """
    choose_dtype(config.dtype, device)
    _, family = read_model_config(config, name)
    processor = load_processor(config, name)
    model = load_weights(config, name, family, device, lora=lora)
    check_vocabulary(processor, model, name)
    return model, processor, family


def load_weights(
    config: ModelConfig, name: str, family: Family, device: torch.device, *, lora: LoraConfig | None = None,
    sharding: Sharding | None = None,
) -> PreTrainedModel:  # fmt: skip
    """Load onto `device`: in NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314), or in model.dtype.

    Args:
        lora: what will be adapted; modules that it trains whole are not quantised.
        sharding: keep this rank's share only; every rank must call it.

    Raises:
        ModelError: no such checkpoint, or weights that are missing, of other sizes, or in pickle form.
        MachineError: the device lacks the number type.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    from vlm_dist.models.experts_nf4 import experts_in_4bit, let_save

    dtype = choose_dtype(config.dtype, device)
    if dtype == torch.float16 and family.overflows_in_float16:
        logger.warning("%s", overflow_words(family))
    if config.load_in_4bit:
        unpack_across_rows()
    stored_in_4bit = config.load_in_4bit and is_stored_in_4bit(name, config.revision, config.trust_remote_code)
    options = {}  # a checkpoint that is stored in 4 bit has its own settings
    if config.load_in_4bit and not stored_in_4bit:
        keep = kept_in_16bit(config, family, trained_whole(family, lora) if lora else ())
        options["quantization_config"] = nf4_config(family, dtype, keep)
    prepare = partial(compute_in, dtype=dtype) if stored_in_4bit else lambda _: None
    try:
        with experts_in_4bit(), sharding.while_loading(family, prepare) if sharding else nullcontext():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                name,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=dtype,
                attn_implementation="sdpa" if config.attn_implementation in ("auto", "varlen") else config.attn_implementation,
                device_map={"": device} if device.type == "cuda" else None,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are told below, by name
                output_loading_info=True,
                **options,
            )
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        raise not_loadable(name, error) from None
    model, found = loaded
    _check_complete(model, found, family, name)
    prepare(model)
    use_our_experts(model)
    _check_kept(config, family, model)
    if config.load_in_4bit:
        keep_nf4_layout(model)
        let_save(model)
    model.loaded_as = config.model_copy(update={"name": name})  # pyright: ignore[reportArgumentType]  (what a merge needs to know)
    return model


def nf4_config(family: Family, dtype: torch.dtype, keep: Iterable[str] = ()) -> Any:
    """4-bit NormalFloat with double quantisation; storage in a float type, so that ZeRO-3 can shard it; the head and the modules of
    `keep` stay as they are."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=[family.head, *NEVER_IN_4BIT, *keep],
    )


def kept_in_16bit(config: ModelConfig, family: Family, trained: Iterable[str] = ()) -> list[str]:
    """Patterns of the modules that loading in 4 bit leaves as they are: those that train whole, and model.keep_16bit."""
    sides = {"vision": (family.vision,), "projector": family.projector}
    return [*trained, *(path for word in config.keep_16bit for path in sides.get(word, (f".*({word})",)))]


def _check_kept(config: ModelConfig, family: Family, model: torch.nn.Module) -> None:
    """Raises ModelError where a pattern of model.keep_16bit matches nothing, or what a checkpoint stores in 4 bit, so that what it means
    is in 4 bit all the same."""
    names = [name for name, _ in model.named_modules()]
    for pattern in config.keep_16bit:
        if pattern not in ("vision", "projector") and not any(re.search(pattern, name) for name in names):
            raise ModelError(
                f"model.keep_16bit: no module is called '{pattern}'; give vision, projector, or part of a path, e.g. {names[-1]}"
            )
    for pattern in config.keep_16bit:
        paths = kept_in_16bit(config.model_copy(update={"keep_16bit": [pattern]}), family)
        packed = (name for name, weight in model.named_parameters() if hasattr(weight, "quant_state"))
        if found := next((name for name in packed if any(re.match(path, name) for path in paths)), None):
            raise ModelError(
                f"model.keep_16bit: '{pattern}' is in 4 bit in this checkpoint ({found}), and its 16-bit weights are not there; leave it "
                "out, or give the checkpoint that it was made from"
            )


def _check_complete(model: torch.nn.Module, found: dict[str, Any], family: Family, name: str) -> None:
    """Every weight that the model uses must have come from the checkpoint, in the size that its config.json says: transformers fills
    the missing ones with random numbers and only warns, and in 4 bit takes any size.

    Raises:
        ModelError: names the first weight that did not.
    """
    missing = sorted(key for key in found["missing_keys"] if not any(key.startswith(path + ".") for path in family.unused))
    if missing:
        raise ModelError(
            f"model.name: '{name}' lacks {len(missing)} weights that the model uses, e.g. {missing[0]}; copy or convert it again"
        )
    sizes = [(key, tuple(stored), tuple(expected)) for key, stored, expected in found["mismatched_keys"]]
    for path, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (expected := (module.out_features, module.in_features)):
            sizes.append((f"{path}.weight", tuple(state.shape), expected))
    for path, weight in expert_weights(model).items():
        state = getattr(weight, "quant_state", None)
        if state is not None and state.shape != weight.expected:
            sizes.append((path, tuple(state.shape), tuple(weight.expected)))
    if sizes:
        key, stored, expected = sizes[0]
        raise ModelError(
            f"model.name: '{name}' holds {key} in size {stored}, its config.json says {expected}; they are of different models"
        )
