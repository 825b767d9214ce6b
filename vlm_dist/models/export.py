"""A trained adapter -> a folder that others load: the adapter itself, or base and adapter merged in 16 bit, compared with the original."""

from __future__ import annotations

import gc
import json
import tempfile
import types
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.config import ModelConfig
from vlm_dist.environment import available_memory
from vlm_dist.errors import ModelError
from vlm_dist.models.generate import encode_chat, generate
from vlm_dist.models.load import read_model_config
from vlm_dist.models.merge import Onto, merge_16bit
from vlm_dist.models.record import make_record, next_token_logits, probe_inputs, write_record
from vlm_dist.models.source import fingerprint

if TYPE_CHECKING:
    import torch

REPORT = "merge.json"
ROOM = 1.2  # of the weights: activations and the KV cache of one short answer
Case = tuple[list[dict[str, Any]], list[Any]]
"""(messages that the assistant is to answer, their pictures)"""


@dataclass(frozen=True)
class Comparison:
    """The merged model beside the trained one (the adapter on the base in the form it was trained on)."""

    onto: Onto
    samples: int
    largest_logit_difference: float
    logit_spread: float
    """Standard deviation of the trained model's logits: what the difference is to be measured by."""
    same_next_token: int
    same_answer: int
    left_out: str = ""
    """Why they were not compared, if they were not."""

    def __str__(self) -> str:
        if self.left_out:
            return f"merged onto the {self.onto} weights; not compared with the trained model: {self.left_out}"
        return (
            f"merged onto the {self.onto} weights; beside the trained model on {self.samples} samples: largest logit difference "
            f"{self.largest_logit_difference:.3g} (logits spread {self.logit_spread:.3g}), same next token {self.same_next_token} of "
            f"{self.samples}, same answer {self.same_answer} of {self.samples}"
        )


def export_merged(
    model: Any, processor: Any, base: ModelConfig, out: Path, *, adapter: Path | None = None, onto: Onto | None = None,
    cases: list[Case] | None = None, max_new_tokens: int = 32,
) -> Comparison:  # fmt: skip
    """Merge, load the result with plain transformers, and compare the two models' logits and answers: on the model's card where there is
    room for the merged weights beside it, else on the CPU; where it fits neither, the comparison says so.

    Args:
        model: the trained PeftModel.
        base: how its base was loaded.
        adapter: its adapter on disk; None: saved from the model.
        onto: None: "original" where the base's 16-bit weights are there, else "dequantised".
        cases: what to compare on; None: the probe's.
    """
    assert base.name is not None
    if onto is None:
        hf_config, _ = read_model_config(base, base.name)
        onto = "original" if getattr(hf_config, "quantization_config", None) is None else "dequantised"
    with tempfile.TemporaryDirectory() as folder:
        if adapter is None:
            model.save_pretrained(folder)
        merge_16bit(base, adapter or Path(folder), processor, out, onto, _trained_dtype(model))
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    place = place_for(size, model.device)
    if place is None:
        free = f"the GPU and the host's memory have too little room ({available_memory() / 1e9:.1f} GB are free here)"
        comparison = Comparison(onto, 0, 0.0, 0.0, 0, 0, f"its weights take {size / 1e9:.1f} GB, {free}")
    else:
        cases = probe_inputs(processor) if cases is None else cases
        trained = _observe(model, processor, cases, max_new_tokens)
        del model  # where the caller keeps none, only one model is in memory at a time
        gc.collect()
        comparison = _compare(onto, trained, _observe(_load_merged(out, place), processor, cases, max_new_tokens))
    (out / REPORT).write_text(json.dumps(asdict(comparison), indent=1) + "\n")
    return comparison


def place_for(size: int, device: torch.device) -> torch.device | None:
    """Where a model of so many bytes can be loaded and run: on this card beside what it holds, or on the CPU; None: nowhere."""
    import torch

    if device.type == "cuda" and size * ROOM <= torch.cuda.mem_get_info(device)[0]:
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


def _observe(model: Any, processor: Any, cases: list[Case], max_new_tokens: int) -> list[tuple[Any, str]]:
    """Next-token logits and answer of each case."""
    logits = next_token_logits(model, cases, processor)
    answers = [generate(model, processor, encode_chat(processor, *case), max_new_tokens)[0] for case in cases]
    return list(zip(logits, answers, strict=True))


def _compare(onto: Onto, trained: list[tuple[Any, str]], merged: list[tuple[Any, str]]) -> Comparison:
    pairs = list(zip(trained, merged, strict=True))
    return Comparison(
        onto=onto,
        samples=len(pairs),
        largest_logit_difference=max((float((ours[0] - theirs[0]).abs().max()) for ours, theirs in pairs), default=0.0),
        logit_spread=max((float(ours[0].std()) for ours, _ in pairs), default=0.0),
        same_next_token=sum(int(ours[0].argmax()) == int(theirs[0].argmax()) for ours, theirs in pairs),
        same_answer=sum(ours[1] == theirs[1] for ours, theirs in pairs),
    )
