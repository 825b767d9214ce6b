"""A trained adapter -> a folder that others load: the adapter itself, or base and adapter merged in 16 bit, compared with the original."""

from __future__ import annotations

import gc
import json
import tempfile
import types
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.config import ModelConfig
from vlm_dist.environment import available_memory
from vlm_dist.errors import ModelError
from vlm_dist.models.comparison import Case, Comparison, blame, compare, observe
from vlm_dist.models.load import read_model_config
from vlm_dist.models.merge import Onto, merge_16bit
from vlm_dist.models.record import make_record, probe_inputs, write_record
from vlm_dist.models.source import fingerprint
from vlm_dist.waiting import waiting

if TYPE_CHECKING:
    import torch

REPORT = "merge.json"
ROOM = 1.2  # of the weights: activations and the KV cache of one short answer


def export_merged(
    model: Any, processor: Any, base: ModelConfig, out: Path, *, adapter: Path | None = None, onto: Onto | None = None,
    cases: list[Case] | None = None, answers: list[dict[str, Any]] | None = None, dtype: str = "auto", max_new_tokens: int = 32,
) -> Comparison:  # fmt: skip
    """Merge, load the result with plain transformers, and compare the two models' logits, answers, and what held-out answers cost them: on
    the model's card where there is room for the merged weights beside it, else on the CPU; where it fits neither, the comparison says so.
    Where the answers cost more, it is measured which part's rounding does it.

    Args:
        model: the trained PeftModel.
        base: how its base was loaded.
        adapter: its adapter on disk; None: saved from the model.
        onto: None: "original" where the base's 16-bit weights are there, else "dequantised".
        cases: what to compare on; None: the probe's.
        answers: held-out conversations as tensors with `labels`, one a batch.
        dtype: number type of the merged weights: "auto" (16 bit, the base's own kind), "bfloat16", "float16" or "float32".
    """
    assert base.name is not None
    if onto is None:
        hf_config, _ = read_model_config(base, base.name)
        onto = "original" if getattr(hf_config, "quantization_config", None) is None else "dequantised"
    cases, answers, device = probe_inputs(processor) if cases is None else cases, answers or [], model.device
    trained_dtype = _trained_dtype(model)
    with tempfile.TemporaryDirectory() as folder:
        if adapter is None:
            model.save_pretrained(folder)
            adapter = Path(folder)
        with waiting(f"merging into {out}"):
            merge_16bit(base, adapter, processor, out, onto, trained_dtype, dtype)
        place = _place_of(out, device)
        if isinstance(place, str):
            comparison = Comparison.without(onto, place)
        else:
            with waiting("asking the trained model"):
                trained = observe(model, processor, cases, answers, max_new_tokens)
            del model  # where the caller keeps none, only one model is in memory at a time
            gc.collect()
            merged = _load_merged(out, place)
            with waiting("asking the merged model"):
                again = observe(merged, processor, cases, answers, max_new_tokens)
            comparison = compare(onto, str(merged.dtype).removeprefix("torch."), trained, again)
            del merged
            gc.collect()
        if comparison.is_worse and comparison.dtype != "float32":
            whole = Path(folder) / "float32"
            merge_16bit(base, adapter, processor, whole, onto, trained_dtype, "float32")
            place = _place_of(whole, device)
            if not isinstance(place, str):
                with waiting("looking for the part whose rounding costs it"):
                    comparison = blame(comparison, _load_merged(whole, place), answers)
    (out / REPORT).write_text(json.dumps(asdict(comparison), indent=1) + "\n")
    return comparison


def _place_of(out: Path, device: torch.device) -> torch.device | str:
    """Where what was merged can be loaded and run; or why nowhere."""
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if (place := place_for(size, device)) is not None:
        return place
    free = f"the GPU and the host's memory have too little room ({available_memory() / 1e9:.1f} GB are free here)"
    return f"its weights take {size / 1e9:.1f} GB, {free}"


def place_for(size: int, device: torch.device) -> torch.device | None:
    """Where a model of so many bytes can be loaded and run: on this card beside what it holds, or on the CPU; None: nowhere."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps of freed blocks is room too
        if size * ROOM <= torch.cuda.mem_get_info(device)[0]:
            return device
    return torch.device("cpu") if size * ROOM <= available_memory() else None


def allow_merging(model: Any) -> Any:
    """Give a PeftModel the method `save_pretrained_merged`. Returns the model."""
    model.save_pretrained_merged = types.MethodType(save_pretrained_merged, model)
    return model


def save_pretrained_merged(
    model: Any, save_directory: str, tokenizer: Any = None, save_method: str = "merged_16bit", onto: Onto | None = None
) -> Comparison | None:
    """Save the trained model for use elsewhere; bound to what `FastVisionModel.get_peft_model` returns.

    Args:
        tokenizer: the processor.
        save_method: "merged_16bit": one checkpoint in 16 bit, which transformers and vLLM load; "lora": the adapter with its
            processor and the record that loading checks.
        onto: "original" (default where the base is stored in 16 bit) or "dequantised" weights; docs/models.md compares them.

    Returns:
        How far the merged model is from the trained one (also printed); None for "lora".

    Raises:
        ModelError: an unknown save_method, no processor, or a base that cannot be merged.
    """
    if save_method not in ("merged_16bit", "lora"):
        raise ModelError(f"save_method={save_method!r} is not supported; use 'merged_16bit' or 'lora'")
    if tokenizer is None:
        raise ModelError("save_pretrained_merged: give the processor too, so that the result loads by itself")
    base = model.get_base_model().loaded_as
    if save_method == "lora":
        model.save_pretrained(save_directory)
        tokenizer.save_pretrained(save_directory)
        write_record(make_record(model, tokenizer, base, fingerprint(base.name, base.revision)), Path(save_directory))
        return None
    comparison = export_merged(model, tokenizer, base, Path(save_directory), onto=onto)
    print(comparison)
    return comparison


def _trained_dtype(model: Any) -> Any:
    """The type that NF4 weights come back in when they are used."""
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            return state.dtype
    return model.dtype


def _load_merged(out: Path, device: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(out, device_map={"": device} if device.type == "cuda" else None).eval()
