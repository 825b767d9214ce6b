"""Adapter folders, of whatever made them: where one lies, what its base is and where that is now, and putting it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.config_load import load_config
from vlm_dist.errors import ModelError
from vlm_dist.models.experts_lora import prepare_experts, ranks_of_parameters
from vlm_dist.models.files import REMEDY, opened
from vlm_dist.models.load import is_stored_in_4bit
from vlm_dist.models.record import read_record
from vlm_dist.models.source import is_there, looks_like_path
from vlm_dist.run_dir import RunDir

WEIGHTS = "adapter_model.safetensors"
ELSEWHERE = "load it with the version of transformers that trained it, or train again"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model beside it."""
    return (folder / "adapter_config.json").exists() and not any(folder.glob("model*.safetensors"))


def check_there(source: str) -> None:
    """Before anything is loaded.

    Raises:
        ModelError: a path where nothing lies that could answer.
    """
    run = RunDir(Path(source))
    if looks_like_path(source) and not (run.config.exists() or find_adapter(source) or (run.path / "config.json").exists()):
        raise ModelError(
            f"{source}: no run directory (no config.yaml in it), no adapter and no checkpoint; give one such as runs/quickstart"
        )


def find_adapter(source: str) -> Path | None:
    """The adapter folder that a name means: itself, the only one in it (PEFT saves an adapter of another name than "default" as
    FOLDER/NAME), or that of a run directory. None: no adapter (a checkpoint, a run that trained every weight).

    Raises:
        ModelError: the run is not finished, or several adapters lie in the folder.
    """
    run = RunDir(Path(source))
    if not run.config.exists():
        return run.path if is_adapter(run.path) else _only_inside(run.path)
    if run.model.exists():
        return None
    if not run.adapter.exists():
        raise ModelError(f"{run.path}: has no trained model yet; finish it with `vlm-dist train {run.config}`")
    return run.adapter


def _only_inside(folder: Path) -> Path | None:
    """The adapter that lies in a folder without a model."""
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    found = sorted(path for path in folder.iterdir() if is_adapter(path))
    if len(found) > 1:
        raise ModelError(f"{folder}: holds {len(found)} adapters ({', '.join(path.name for path in found)}); give one, such as {found[0]}")
    return found[0] if found else None


def run_of(folder: Path) -> RunDir | None:
    """The run whose adapter, or one of whose checkpoints, lies in `folder`."""
    path = folder.resolve()
    run = RunDir(path.parent if path.name == "adapter" else path.parent.parent)
    return run if run.config.exists() and run.path != path and path in (run.adapter, run.checkpoints / path.name) else None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        ModelError: it is damaged, or the weights beside it are missing or pickled.
    """
    path = folder / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["peft_type"]
    except OSError as error:
        raise ModelError(f"{path}: {(error.strerror or 'cannot be read').lower()}; {REMEDY}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is damaged ({error}); copy or save the adapter again") from None
    if not (folder / WEIGHTS).exists():
        pickled = (folder / "adapter_model.bin").exists()
        found = "its weights are pickled (adapter_model.bin), and could run any code when read" if pickled else f"there is no {WEIGHTS}"
        raise ModelError(f"{folder}: {found}; save the adapter again with PEFT's save_pretrained")
    return settings


def base_of(folder: Path, given: str | None = None, **changes: Any) -> ModelConfig:
    """What an adapter's base is, and how it was loaded: by its run's config.yaml, else by its record, else (an adapter of others) as the
    base is stored: in 16 bit or in 4 bit.

    Args:
        given: where the base is now; None: where adapter_config.json says, which may have been corrected by hand, or else where the run
            and the record say.
        changes: settings of `ModelConfig` that are to be others.

    Raises:
        ModelError: the base is in none of these places, or nothing names one.
    """
    record, run = read_record(folder), run_of(folder)
    then = record["base"] if record else {}
    of_run = load_config(run.config).model if run else None
    name = given or _place(folder, then.get("name"), run, of_run)
    if not is_there(name):
        where = "" if looks_like_path(name) else " here and cannot be had from the hub"
        whose = "--base-model:" if given else f"{folder}: its base"
        remedy = "give the folder of the base" if given else "say where it is now with --base-model, or in its adapter_config.json"
        raise ModelError(f"{whose} {name} does not exist{where}; {remedy}")
    revision = read_adapter_config(folder).get("revision") or (then.get("revision") if name == then.get("name") else None)
    settings: dict[str, Any] = {key: then[key] for key in ("load_in_4bit", "dtype", "keep_16bit") if key in then}
    if of_run is not None:
        settings = of_run.model_dump(exclude={"name", "revision", "scratch", "mini_vlm", "freeze"})
    settings |= {"name": name, "revision": None if given else revision, **changes}
    if "load_in_4bit" not in settings:
        settings["load_in_4bit"] = is_stored_in_4bit(name, settings["revision"])
    return ModelConfig(**settings)


def _place(folder: Path, recorded: str | None, run: RunDir | None, of_run: ModelConfig | None) -> str:
    """Where the base lies, by the first of the adapter's own files that names a place that is there."""
    stated = read_adapter_config(folder).get("base_model_name_or_path")
    if stated and recorded and stated != recorded:
        return stated  # corrected by hand
    configured = of_run.name if of_run else None
    made = str(run.initial_model) if run and of_run and of_run.name is None else None
    places = [place for place in (stated, configured, made, recorded) if place]
    if not places:
        raise ModelError(f"{folder}: adapter_config.json names no base model (base_model_name_or_path); add it there, or give --base-model")
    here = [place for place in places if (Path(place) / "config.json").is_file()]
    return next(iter(here), places[0])


def not_quantised_under(folder: Path) -> LoraConfig | None:
    """What must not be quantised under this adapter: the modules that trained whole."""
    whole = read_adapter_config(folder).get("modules_to_save")
    return LoraConfig(modules_to_save=whole) if whole else None


def put_on(model: Any, folder: Path, *, trainable: bool = False, dropout: float | None = None) -> Any:
    """The model with the adapter on it: a PeftModel.

    Args:
        trainable: it is to be trained further.
        dropout: on the adapter's input; None: that of the adapter's training.

    Raises:
        ModelError: the adapter is of another model, or a tensor of it finds no module.
    """
    from peft import PeftConfig, PeftModel

    read_adapter_config(folder)
    base = model.name_or_path
    with opened(folder / WEIGHTS) as stored:
        stored.keys()  # it can be read
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if dropout is not None:
            config.lora_dropout = dropout
        with ranks_of_parameters():
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=prepare_experts(model, config))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]
        raise ModelError(
            f"{folder}: the adapter does not fit the model in '{base}' ({why}); give the base that it was trained on"
        ) from None
    check_keys(adapted, folder)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def put_on_shapes(model: Any, folder: Path) -> Any:
    """The same of a model without data, on the meta device: the adapter's parameters have shapes, and those that train say so."""
    import torch
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    with torch.device("meta"), ranks_of_parameters():
        return PeftModel(model, prepare_experts(model, config))


def check_keys(model: Any, folder: Path) -> None:
    """Every stored tensor must have gone into a module, and every adapter of the model must have been stored. (An adapter on the output
    head or the embeddings has the layer below it beside it; PEFT loads that too.)

    Raises:
        ModelError: names the first that did not. (PEFT only warns, or says nothing: colpali#424.)
    """
    from peft import get_peft_model_state_dict

    with opened(folder / WEIGHTS) as file:
        stored = set(file.keys())
    loaded = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    of_base = {name for name, _ in model.named_parameters(remove_duplicate=False)} | set(model.state_dict())
    if odd := sorted(stored - loaded - of_base):
        raise ModelError(
            f"{folder}: {len(odd)} of the adapter's {len(stored)} tensors fit no module of the model, e.g. {odd[0]}; {ELSEWHERE}"
        )
    if lacking := sorted(loaded - stored):
        raise ModelError(f"{folder}: {len(lacking)} tensors are missing in {WEIGHTS}, e.g. {lacking[0]}; {ELSEWHERE}")


def has_processor(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("processor_config.json", "preprocessor_config.json"))
