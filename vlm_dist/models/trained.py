"""A run directory, a checkpoint folder or a hub id -> a model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_dist.config import ModelConfig
from vlm_dist.config_load import load_config
from vlm_dist.errors import ModelError
from vlm_dist.models.load import load_model
from vlm_dist.run_dir import RunDir


def load_trained(source: str, device: Any, *, base: bool = False) -> tuple[Any, Any]:
    """Load what a run produced (its adapter on its base, or its model), or any checkpoint.

    Args:
        base: leave the run's adapter off.

    Returns:
        (model, processor)

    Raises:
        ModelError: the run is not finished, or there is no such checkpoint.
    """
    run = RunDir(Path(source))
    if not run.config.exists():
        model, processor, _ = load_model(ModelConfig(name=source, load_in_4bit=False), source, device)
        return model, processor
    config = load_config(run.config)
    if run.model.exists():
        model, processor, _ = load_model(
            ModelConfig(name=str(run.model), load_in_4bit=False, dtype=config.model.dtype), str(run.model), device
        )
        return model, processor
    if not run.adapter.exists() or config.model.name is None:
        raise ModelError(f"{run.path}: has no trained model yet; finish it with `vlm-dist train {run.config}`")
    quantise_projector = config.lora is None or config.lora.projector != "full"
    model, processor, _ = load_model(config.model, config.model.name, device, quantise_projector=quantise_projector)
    if base:
        return model, processor
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(run.adapter)), processor
