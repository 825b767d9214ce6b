"""A run directory, an adapter folder, a checkpoint folder or a hub id -> a model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_dist.config import ModelConfig
from vlm_dist.config_load import load_config
from vlm_dist.config_model import VideoConfig
from vlm_dist.errors import ModelError
from vlm_dist.models.adapters import base_of, find_adapter, has_processor, not_quantised_under, put_on
from vlm_dist.models.files import RECORD, check_files
from vlm_dist.models.load import is_stored_in_4bit, load_model
from vlm_dist.models.processor import load_processor
from vlm_dist.models.record import check_base, check_probe, check_processor, read_record, read_system_prompt
from vlm_dist.models.source import is_there
from vlm_dist.run_dir import RunDir
from vlm_dist.waiting import waiting


def load_trained(source: str, device: Any, *, base: bool = False, base_model: str | None = None) -> tuple[Any, Any]:
    """Load what a run produced (its adapter on its base, or its model), an adapter folder, or any checkpoint.

    Args:
        base: leave the adapter off.
        base_model: where the adapter's base is now, if not where its files say.

    Returns:
        (model, processor)

    Raises:
        ModelError: the run is not finished, there is no such checkpoint, or the adapter does not fit what it is put on.
    """
    with waiting(f"loading {source}"):
        return _load(source, device, base, base_model)


def _load(source: str, device: Any, base: bool, base_model: str | None) -> tuple[Any, Any]:
    adapter = find_adapter(source)
    if adapter is not None:
        return load_adapter(adapter, base_of(adapter, base_model), device, base=base)
    if base_model is not None:
        raise ModelError(f"--base-model: '{source}' is no adapter, so it has no base; leave the option away")
    run = RunDir(Path(source))
    name = str(run.model) if run.config.exists() else source
    if (Path(name) / RECORD).exists():
        check_files(Path(name))
    dtype = load_config(run.config).model.dtype if run.config.exists() else "auto"
    model, processor, _ = load_model(ModelConfig(name=name, load_in_4bit=is_stored_in_4bit(name), dtype=dtype), name, device)
    return model, processor


def start_of(source: str) -> str | None:
    """What a run that trained every weight began with, if it is still there; None for anything else."""
    run = RunDir(Path(source))
    if not run.config.exists() or not run.model.exists():
        return None
    named = load_config(run.config).model.name
    start = named or str(run.initial_model)
    return start if is_there(start) else None


def system_prompt_of(source: str) -> str | None:
    """The system prompt that every sample of the training had, as its result remembers it; None: there was none, or several.

    Raises:
        ModelError: the run is not finished, or the record is damaged.
    """
    run = RunDir(Path(source))
    return read_system_prompt(find_adapter(source) or (run.model if run.config.exists() else run.path))


def video_config_of(source: str) -> VideoConfig:
    """Which frames of videos a run was shown; of anything else, and of a run without videos, the default."""
    run = RunDir(Path(source))
    return (load_config(run.config).data.video if run.config.exists() else None) or VideoConfig()


def load_adapter(folder: Path, base_model: ModelConfig, device: Any, *, base: bool = False) -> tuple[Any, Any]:
    """An adapter on its base, with the processor that was saved beside it; checked against its record where there is one.

    Raises:
        ModelError: another base, another preprocessing, a key of the adapter without a module, or other logits than in training.
    """
    assert base_model.name is not None
    check_files(folder)
    record = read_record(folder)
    if record is not None:
        check_base(record, base_model.name, base_model.revision)
    model, processor, _ = load_model(base_model, base_model.name, device, lora=not_quantised_under(folder))
    if has_processor(folder):
        processor = load_processor(ModelConfig(name=str(folder)), str(folder))
    if record is not None:
        check_processor(record, processor)
    if base:
        return model, processor
    adapted = put_on(model, folder)
    if record is not None and in_the_form_of(record, base_model):
        check_probe(record, adapted, processor)
    return adapted, processor


def in_the_form_of(record: dict[str, Any], base_model: ModelConfig) -> bool:
    """Whether the base is held as it was in training, so that the logits must be those of then."""
    return (record["base"]["load_in_4bit"], record["base"]["dtype"]) == (base_model.load_in_4bit, base_model.dtype)
