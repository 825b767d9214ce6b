"""README.md of an adapter folder, in the form that the Hugging Face hub reads."""

from __future__ import annotations

from typing import Any

from vlm_dist.config import Config, LoraConfig


def adapter_card(config: Config, base: str, scores: dict[str, Any]) -> str:
    """What was trained, on what, how well it did, and how to load it.

    Args:
        base: folder or hub id of the base.
        scores: "before" and "after" evaluations (or None), as summary.json holds them.
    """
    assert config.lora is not None
    form = "NF4 with double quantisation" if config.model.load_in_4bit else config.model.dtype
    length = f"{config.training.steps} steps" if config.training.steps else f"{config.training.epochs:g} epochs"
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: image-text-to-text
tags: [vlm_dist, lora]
---

# {config.name}

A LoRA adapter for `{base}` ({form} in training), trained by vlm_dist: {length} of {config.training.global_batch} samples,
{_describe(config.lora)}, learning rate {config.optim.lr:g} ({config.optim.schedule}), seed {config.seed}.
{_scores(scores)}
## Load it

```python
from vlm_dist import FastVisionModel
model, processor = FastVisionModel.from_pretrained("THIS_FOLDER")   # base and adapter; checks vlm_dist.json
```

or with PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("{base}"), "THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
```

`vlm_dist.json` holds the fingerprints of the base and of the preprocessing that the adapter was trained with, and a probe: logits
that the trained model gave to drawn pictures. Loading through vlm_dist checks all three.
"""


def _describe(lora: LoraConfig) -> str:
    sides = [side for side in ("vision", "language") if getattr(lora, side)]
    kinds = [kind for kind in ("attention", "mlp") if getattr(lora, kind)]
    extra = ["rsLoRA"] * lora.rslora + ["DoRA"] * lora.dora + [f"projector: {lora.projector}"] * (lora.projector != "frozen")
    return f"rank {lora.r}, alpha {lora.alpha:g} on {' and '.join(kinds)} of {' and '.join(sides) or 'no tower'}" + "".join(
        f", {word}" for word in extra
    )


def _scores(scores: dict[str, Any]) -> str:
    rows = [(phase, scores.get(phase)) for phase in ("before", "after")]
    if not any(row for _, row in rows):
        return ""
    lines = [f"| {phase} | {row['exact_match']:.1%} | {row['samples']} |" for phase, row in rows if row]
    return "\n## Held-out samples\n\n| | exact match | samples |\n|---|---|---|\n" + "\n".join(lines) + "\n"
