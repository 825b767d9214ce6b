"""Writing what was trained, in the forms that PEFT and transformers load by themselves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any


def save_adapter(model: Any, weights: dict[str, Any], processor: Any, out: Path) -> None:
    """A PEFT adapter folder with the processor beside it; whole or not there.

    Args:
        weights: the trainable parameters by name, complete, on the CPU.
    """
    temporary = _fresh(out)
    model.save_pretrained(temporary, state_dict=weights, safe_serialization=True)
    processor.save_pretrained(temporary)
    _replace(temporary, out)


def save_model(model: Any, weights: dict[str, Any], processor: Any, out: Path) -> None:
    """A transformers checkpoint folder with the processor in it; whole or not there.

    Args:
        weights: the trainable parameters by name, complete, on the CPU; frozen ones are taken from the model.
    """
    import torch

    temporary = _fresh(out)
    state = {name: weights.get(name, tensor) for name, tensor in model.state_dict().items()}
    dtype = model.config.dtype or torch.float32
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.save_pretrained(temporary, state_dict=state)
    processor.save_pretrained(temporary)
    _replace(temporary, out)


def _fresh(out: Path) -> Path:
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def _replace(temporary: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)
