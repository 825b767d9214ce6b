"""README.md of an adapter or a model, in the form that the Hugging Face hub reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlm_dist.config import Config, LoraConfig

NOT_SCORES = ("exact_match", "samples", "by_kind", "step", "without_pictures")


@dataclass(frozen=True)
class Example:
    """A held-out question with its answers."""

    picture: str
    """Path of the picture, from the README."""
    prompt: str
    before: str
    after: str
    truth: str


def model_card(
    config: Config, base: str, scores: dict[str, Any], *, merged: str | None = None, examples: list[Example] | None = None,
    own_code: bool = False,
) -> str:  # fmt: skip
    """What was trained, on what, how well it did, and how to load it.

    Args:
        base: folder or hub id of the base.
        scores: "before" and "after" evaluations (or None), as summary.json holds them.
        merged: how the merged model compares with the trained one, in words; None: the card is for the adapter.
        examples: held-out answers to show.
        own_code: the base brings its code along (a mini VLM).
    """
    assert config.lora is not None
    form = "NF4 with double quantisation" if config.model.load_in_4bit else config.model.dtype
    length = f"{config.training.steps} steps" if config.training.steps else f"{config.training.epochs:g} epochs"
    what = "A LoRA adapter for" if merged is None else "A 16-bit model: base and adapter merged. Base:"
    sources = ", ".join(f"`{pattern}`" for pattern in config.data.train_shards)
    return f"""---
base_model: {base}
library_name: {"peft" if merged is None else "transformers"}
pipeline_tag: image-text-to-text
tags: [vlm_dist, lora]
---

# {config.name}

{what} `{base}` ({form} in training), trained by vlm_dist: {length} of {config.training.global_batch} samples,
{_describe(config.lora)}, learning rate {config.optim.lr:g} ({config.optim.schedule}), seed {config.seed}.{_start(config, base)}

Data: {sources}; rows of at most {config.data.max_seq_length} tokens{", packed" if config.data.packing else ""}.
{_scores(scores)}{_examples(examples or [])}
{_loading(base, merged, own_code)}"""


def adapter_card(name: str, base: str, *, merged: str | None = None, own_code: bool = False) -> str:
    """The same for an adapter of which no run is known: what it is of, and how to load it."""
    what = "A LoRA adapter for" if merged is None else f"A 16-bit model: `{name}` merged into its base. Base:"
    return f"""---
base_model: {base}
library_name: {"peft" if merged is None else "transformers"}
pipeline_tag: image-text-to-text
tags: [lora]
---

# {name}

{what} `{base}`.

{_loading(base, merged, own_code)}"""


def _loading(base: str, merged: str | None, own_code: bool) -> str:
    trust = ", trust_remote_code=True" if own_code else ""
    told = (
        "\nThis architecture is none of transformers' own. `trust_remote_code=True` runs `mini_vlm.py`, which lies in the folder that is "
        "loaded: read it first.\n"
        if own_code
        else ""
    )
    if merged is not None:
        serve = (
            "Servers such as vLLM do not know it; `vlm-dist chat THIS_FOLDER` serves it."
            if own_code
            else "or serve it: `vllm serve THIS_FOLDER`"
        )
        return f"""## Load it

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER"{trust})
processor = AutoProcessor.from_pretrained("THIS_FOLDER"{trust})
```
{told}
{serve}

{merged[0].upper()}{merged[1:]}.
"""
    return f"""## Load it

```python
from vlm_dist import FastVisionModel
model, processor = FastVisionModel.from_pretrained("THIS_FOLDER")   # base and adapter; checks vlm_dist.json
```

or with PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("{base}"{trust}), "THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER"{trust})
```
{told}
`vlm_dist.json` holds the fingerprints of the base and of the preprocessing that the adapter was trained with, and a probe: logits
that the trained model gave to drawn pictures. Loading through vlm_dist checks all three.
"""


def _start(config: Config, base: str) -> str:
    start = config.model.name
    return f" It went on from the adapter in `{start}`." if start is not None and start != base else ""


def _describe(lora: LoraConfig) -> str:
    sides = [side for side in ("vision", "language") if getattr(lora, side)]
    kinds = [kind for kind in ("attention", "mlp") if getattr(lora, kind)]
    extra = ["rsLoRA"] * lora.rslora + ["DoRA"] * lora.dora + [f"projector: {lora.projector}"] * (lora.projector != "frozen")
    return f"rank {lora.r}, alpha {lora.alpha:g} on {' and '.join(kinds)} of {' and '.join(sides) or 'no tower'}" + "".join(
        f", {word}" for word in extra
    )


def _scores(scores: dict[str, Any]) -> str:
    rows = [(phase, row) for phase in ("before", "after") if (row := scores.get(phase))]
    if not rows:
        return ""
    more = dict.fromkeys(name for _, row in rows for name in row if name not in NOT_SCORES)
    kinds = dict.fromkeys(kind for _, row in rows for kind in row.get("by_kind", {}))
    table = [["", "samples", "exact match", *more, *(f"{kind}, exact" for kind in kinds)]]
    for phase, row in rows:
        shares = [f"{row.get('by_kind', {}).get(kind, 0):.1%}" for kind in kinds]
        table.append([phase, str(row["samples"]), f"{row['exact_match']:.1%}", *(f"{row[name]:.3f}" for name in more), *shares])
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n## Held-out samples\n\n" + "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]]) + "\n"


def _examples(examples: list[Example]) -> str:
    if not examples:
        return ""
    lines = ["| picture | question | before | after | truth |", "|---|---|---|---|---|"]
    for one in examples:
        texts = [text.replace("|", "\\|").replace("\n", " ") for text in (one.prompt, one.before, one.after, one.truth)]
        lines.append(f"| ![]({one.picture}) | {' | '.join(texts)} |")
    return "\n" + "\n".join(lines) + "\n"
