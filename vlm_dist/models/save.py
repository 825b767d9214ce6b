"""Writing what was trained, in the forms that PEFT and transformers load by themselves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from vlm_dist.buffers import moving_buffers
from vlm_dist.disk import readable_as_others
from vlm_dist.models.record import write_record


def save_adapter(model: Any, weights: dict[str, Any], processor: Any, out: Path, record: dict[str, Any], card: str) -> None:
    """A PEFT adapter folder with the processor beside it; whole or not there.

    Args:
        weights: the trainable parameters, and the buffers that training moved, by name, complete, on the CPU.
        record: what loading is to check (models/record.py).
        card: README.md.
    """
    temporary = fresh_folder(out)
    model.save_pretrained(temporary, state_dict=weights, safe_serialization=True)
    _add_buffers(temporary / "adapter_model.safetensors", {name: weights[name] for name in moving_buffers(model)})
    processor.save_pretrained(temporary)
    write_record(record, temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    put_in_place(temporary, out)


def _add_buffers(file: Path, buffers: dict[str, Any]) -> None:
    """To an adapter, by the names under which PEFT finds them again; those of modules that train whole it has written itself."""
    from safetensors.torch import load_file, save_file

    buffers = {name: buffer for name, buffer in buffers.items() if ".modules_to_save." not in name}
    if buffers:
        save_file({**load_file(file), **buffers}, file, {"format": "pt"})


def save_model(model: Any, weights: dict[str, Any], processor: Any, out: Path, system_prompt: str | None = None) -> None:
    """A transformers checkpoint folder with the processor in it; whole or not there.

    Args:
        weights: the trainable parameters by name, complete, on the CPU, and frozen ones that are sharded; others are taken from the model.
        system_prompt: what every sample of the training began with, if all had the same.
    """
    import torch

    temporary = fresh_folder(out)
    dtype = model.config.dtype or torch.float32
    made: dict[int, Any] = {}  # a tensor that has two names (a tied head) stays one
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            value = weights.get(name, tensor.detach())
            made[id(tensor)] = value.to(dtype) if value.is_floating_point() else value
        state[name] = made[id(tensor)]
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
    readable_as_others(temporary)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)
