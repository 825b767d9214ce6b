"""Writing what was trained, in the forms that PEFT and transformers load by themselves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from vlm_dist.models.record import write_record


def save_adapter(model: Any, weights: dict[str, Any], processor: Any, out: Path, record: dict[str, Any], card: str) -> None:
    """A PEFT adapter folder with the processor beside it; whole or not there.

    Args:
        weights: the trainable parameters by name, complete, on the CPU.
        record: what loading is to check (models/record.py).
        card: README.md.
    """
    temporary = fresh_folder(out)
    model.save_pretrained(temporary, state_dict=weights, safe_serialization=True)
    processor.save_pretrained(temporary)
    write_record(record, temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    put_in_place(temporary, out)


def save_model(model: Any, weights: dict[str, Any], processor: Any, out: Path, system_prompt: str | None = None) -> None:
    """A transformers checkpoint folder with the processor in it; whole or not there.

    Args:
        weights: the trainable parameters by name, complete, on the CPU, and frozen ones that are sharded; others are taken from the model.
        system_prompt: what every sample of the training began with, if all had the same.
    """
    import torch

    temporary = fresh_folder(out)
    found = {id(parameter): weights[name] for name, parameter in model.named_parameters() if name in weights}
    shared = {name: found.get(id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)}  # a head of embeddings
    state = {name: tensor if shared.get(name) is None else shared[name] for name, tensor in model.state_dict().items()}
    dtype = model.config.dtype or torch.float32
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.save_pretrained(temporary, state_dict=state)
    processor.save_pretrained(temporary)
    write_record({"version": 1, "system_prompt": system_prompt}, temporary)
    put_in_place(temporary, out)


def fresh_folder(out: Path) -> Path:
    """An empty folder beside `out`, to be filled and then put in its place."""
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def put_in_place(temporary: Path, out: Path) -> None:
    """`out` becomes what `temporary` is."""
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)
