"""First settings for a model on a card, from a table and without reading the model; `vlm-dist plan --auto` finds better ones."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from vlm_dist.models.source import looks_like_path
from vlm_dist.planning.gpus import Gpu

COUNTED = {3: (2.6, 4.6, 17.1), 7: (6.1, 8.4, 23.1), 32: (20.2, 24.3, 59.9), 72: (42.5, 48.8, 99.0)}
"""GB by billions of parameters: of the weights in 4 bit, of a step with everything recomputed, and with nothing: counted by
`vlm-dist plan` for Qwen2.5-VL, QLoRA of rank 16, one row of 2,048 tokens (docs/memory.md). Sizes between are between."""
ROW = 2048
BF16 = 2.5
"""GB of 16-bit weights for each billion that a model's name says; the vision tower comes on top of it."""
GLOBAL_BATCH = 16
SUGGESTED = {
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3_vl": "Qwen/Qwen3-VL-8B-Instruct",
    "qwen2_vl": "Qwen/Qwen2-VL-7B-Instruct",
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_next": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_next_video": "llava-hf/LLaVA-NeXT-Video-7B-hf",
    "llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "internvl": "OpenGVLab/InternVL3-8B-hf",
    "gemma3": "google/gemma-3-4b-it",
    "mllama": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "mistral3": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "smolvlm": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
}
PATCH = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32}
"""Side in pixels of what becomes a token, where the processor takes bounds in pixels."""
LONG = {
    "llava_next": 4096,
    "llava_next_video": 4096,
    "internvl": 4096,
    "idefics3": 4096,
    "mistral3": 4096,
    "smolvlm": 4096,
    "llava_onevision": 8192,
}
"""Tokens of a row where a large picture alone takes more than 1,024."""
FAMILY_WORDS = {
    "qwen2_vl": "qwen2vl", "qwen2_5_vl": "qwen25vl", "qwen3_vl": "qwen3vl", "llava": "llava15", "llava_next": "llavav16",
    "llava_next_video": "llavanextvideo", "llava_onevision": "llavaonevision", "internvl": "internvl", "gemma3": "gemma3",
    "mllama": "llama32", "mistral3": "mistralsmall31", "idefics3": "idefics3", "smolvlm": "smolvlm",
}  # fmt: skip
"""What a hub id of the family has in its name."""


@dataclass(frozen=True)
class Known:
    """What is known of a model without reading its weights."""

    name: str
    family: str | None
    """Its `model_type`; None: a hub id that the table lacks."""
    billions: float
    """Parameters."""
    why: str
    """Where that number comes from."""


@dataclass(frozen=True)
class First:
    """The settings, and the memory that they were chosen by."""

    load_in_4bit: bool
    gradient_checkpointing: bool
    micro_batch: int
    max_seq_length: int
    pixels: tuple[int, int] | None
    """Bounds of a picture, where the processor takes them."""
    picture_tokens: int
    """Most tokens of a picture with these bounds."""
    gigabytes: float
    """Expected of a step."""
    card: float
    """Of the card."""

    @property
    def fits(self) -> bool:
        return self.gigabytes <= self.card


def first_settings(model: Known, gpu: Gpu) -> First:
    """The first that should fit of: nothing recomputed, all recomputed, and the same with shorter rows. Where none does, the last."""
    card = gpu.memory / 1e9
    in_4bit, recomputed, kept = _counted(model.billions)
    whole = BF16 * model.billions
    weights = in_4bit if whole > card / 4 else whole
    bounded = model.family in PATCH
    lengths = (ROW, ROW // 2) if bounded else (LONG.get(model.family or "", ROW),)
    for tokens, recompute in product(lengths, (False, True)):
        row = ((recomputed if recompute else kept) - in_4bit) * tokens / ROW
        if weights + row <= card:
            break
    rows = max((n for n in (1, 2, 4, 8, 16) if weights + n * row <= card), default=1)
    token = PATCH.get(model.family or "", 0) ** 2
    pixels = (min(256, tokens // 4) * token, tokens // 2 * token) if bounded else None
    return First(weights == in_4bit, recompute, rows, tokens, pixels, tokens // 2, round(weights + rows * row, 1), round(card, 1))


def known(model: str) -> Known:
    """By a checkpoint's files where it is a folder, else by its name. The name of a family stands for its suggestion."""
    name = SUGGESTED.get(model, model)
    if looks_like_path(name):
        folder = Path(name).expanduser()
        billions = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2e9
        config = folder / "config.json"
        family = json.loads(config.read_text()).get("model_type") if config.is_file() else None
        if billions:
            return Known(name, family, billions, "its files, in 16 bit")
    else:
        plain = re.sub(r"[^a-z0-9]", "", name.lower())
        family = next((key for key in sorted(FAMILY_WORDS, key=len, reverse=True) if FAMILY_WORDS[key] in plain), None)
    if found := re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.lower()):
        return Known(name, family, float(found[1]) / (1 if found[2] == "b" else 1000), "its name")
    return Known(name, family, 7.0, "nothing tells; assumed")


def _counted(billions: float) -> tuple[float, float, float]:
    """A row of the table, or what lies between two; beyond the largest in proportion, below the smallest like it."""
    import numpy as np

    largest = max(COUNTED)
    scale = max(1.0, billions / largest)
    weights, recomputed, kept = (
        scale * float(np.interp(billions, list(COUNTED), column)) for column in zip(*COUNTED.values(), strict=True)
    )
    return weights, recomputed, kept
