"""How one sample goes through a model, stage by stage, in shapes: the model's own code on tensors without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlm_dist.config import Config
from vlm_dist.families import Family
from vlm_dist.planning.shapes import counting
from vlm_dist.planning.twin import build_twin

ORDER = ("processor: pixel_values", "vision tower", "projector", "processor: input_ids", "text embeddings", "language model", "logits")
OF_A_STAGE = ("last_hidden_state", "logits")


@dataclass(frozen=True)
class Stage:
    """What comes out of one part of the model."""

    name: str
    module: str
    """Its path in the model; nothing for the processor's tensors."""
    shape: tuple[int, ...]

    to_dict = asdict


def data_flow(config: Config, hf_config: Any, family: Family, batch: dict[str, Any]) -> list[Stage]:
    """The stages, from pixels and text to logits.

    Args:
        batch: of `collate`, one sample or more.
    """
    plain = config.model.model_copy(update={"load_in_4bit": False, "gradient_checkpointing": False})
    config = config.model_copy(update={"model": plain, "lora": None, "kernels": "off"})
    stages = [Stage(f"processor: {name}", "", tuple(batch[name].shape)) for name in ("pixel_values", "input_ids") if name in batch]
    with counting(on_gpu=False) as shapes:
        model = build_twin(config, hf_config, family, torch.float32, shapes)
        inputs = {name: shapes.without_data(value) for name, value in batch.items()}
        inputs.pop("labels", None)
        with torch.no_grad(), _listening(model, family, stages):
            model(**inputs, use_cache=False)
    return sorted(stages, key=lambda stage: ORDER.index(stage.name))


@contextmanager
def _listening(model: Any, family: Family, stages: list[Stage]) -> Iterator[None]:
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    parts = [("vision tower", family.vision), *(("projector", path) for path in family.projector), ("text embeddings", embedding),
             ("language model", family.language), ("logits", family.head)]  # fmt: skip
    hooks = []
    for name, path in parts:

        def heard(_: Any, __: Any, output: Any, name: str = name, path: str = path) -> None:
            if (tensor := tensor_of(output)) is not None:
                stages.append(Stage(name, path, tuple(tensor.shape)))

        hooks.append(model.get_submodule(path).register_forward_hook(heard))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tensor_of(output: Any) -> torch.Tensor | None:
    """The hidden states, or logits, in what a module returns."""
    if isinstance(output, torch.Tensor):
        return output
    for name in OF_A_STAGE:
        if isinstance(found := getattr(output, name, None), torch.Tensor):
            return found
    first = output[0] if isinstance(output, list | tuple) and output else None
    return first if isinstance(first, torch.Tensor) else None
