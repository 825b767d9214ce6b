"""A run directory, an adapter folder, a checkpoint folder or a hub id -> a model that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.config_load import load_config
from vlm_dist.errors import ModelError
from vlm_dist.models.load import load_model
from vlm_dist.models.processor import load_processor
from vlm_dist.models.record import check_base, check_probe, check_processor, read_record
from vlm_dist.run_dir import RunDir


def load_trained(source: str, device: Any, *, base: bool = False) -> tuple[Any, Any]:
    """Load what a run produced (its adapter on its base, or its model), an adapter folder, or any checkpoint.

    Args:
        base: leave the adapter off.

    Returns:
        (model, processor)

    Raises:
        ModelError: the run is not finished, there is no such checkpoint, or the adapter does not fit what it is put on.
    """
    run = RunDir(Path(source))
    if not run.config.exists():
        if is_adapter(Path(source)):
            return load_adapter(Path(source), base_of(Path(source)), device, base=base)
        model, processor, _ = load_model(ModelConfig(name=source, load_in_4bit=False), source, device)
        return model, processor
    config = load_config(run.config)
    if run.model.exists():
        model, processor, _ = load_model(
            ModelConfig(name=str(run.model), load_in_4bit=False, dtype=config.model.dtype), str(run.model), device
        )
        return model, processor
    if not run.adapter.exists():
        raise ModelError(f"{run.path}: has no trained model yet; finish it with `vlm-dist train {run.config}`")
    return load_adapter(run.adapter, trained_base(run), device, lora=config.lora, base=base)


def trained_base(run: RunDir) -> ModelConfig:
    """How a run loaded its base."""
    model = load_config(run.config).model
    return model if model.name is not None else model.model_copy(update={"name": str(run.initial_model), "mini_vlm": None})


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()


def base_of(folder: Path, **changes: Any) -> ModelConfig:
    """How the base of an adapter folder was loaded: by its record, else by PEFT's adapter_config.json."""
    record = read_record(folder)
    if record is not None:
        base = {name: record["base"][name] for name in ("name", "revision", "load_in_4bit", "dtype")}
    else:
        name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not name:
            raise ModelError(f"{folder}: adapter_config.json names no base model (base_model_name_or_path); add it there")
        base = {"name": name}
    return ModelConfig(**{**base, **changes})


def load_adapter(
    folder: Path, base_model: ModelConfig, device: Any, *, lora: LoraConfig | None = None, base: bool = False
) -> tuple[Any, Any]:
    """An adapter on its base, with the processor that was saved beside it; checked against its record where there is one.

    Raises:
        ModelError: another base, another preprocessing, a key of the adapter without a module, or other logits than in training.
    """
    from peft import PeftModel

    assert base_model.name is not None
    record = read_record(folder)
    if record is not None:
        check_base(record, base_model.name, base_model.revision)
    lora = lora or _trained_whole(folder)
    model, processor, _ = load_model(base_model, base_model.name, device, lora=lora)
    if (folder / "processor_config.json").exists() or (folder / "preprocessor_config.json").exists():
        processor = load_processor(ModelConfig(name=str(folder)), str(folder))
    if record is not None:
        check_processor(record, processor)
    if base:
        return model, processor
    adapted = PeftModel.from_pretrained(model, str(folder))
    check_keys(adapted, folder)
    same_form = record is not None and (record["base"]["load_in_4bit"], record["base"]["dtype"]) == (
        base_model.load_in_4bit,
        base_model.dtype,
    )
    if record is not None and same_form:
        check_probe(record, adapted, processor)
    return adapted, processor


def check_keys(model: Any, folder: Path) -> None:
    """Every stored tensor must have gone into a module, and every adapter of the model must have been stored.

    Raises:
        ModelError: names the first that did not. (PEFT only warns, or says nothing: colpali#424.)
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    loaded = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    remedy = "load it with the version of transformers that trained it, or train again"
    if odd := sorted(stored - loaded):
        raise ModelError(f"{folder}: {len(odd)} of the adapter's {len(stored)} tensors fit no module of the model, e.g. {odd[0]}; {remedy}")
    if lacking := sorted(loaded - stored):
        raise ModelError(f"{folder}: {len(lacking)} tensors are missing in adapter_model.safetensors, e.g. {lacking[0]}; {remedy}")


def _trained_whole(folder: Path) -> LoraConfig | None:
    """What must not be quantised under this adapter."""
    whole = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("modules_to_save")
    return LoraConfig(modules_to_save=whole) if whole else None
