"""Checkpoints: one portable form whatever the ZeRO stage and the number of ranks; whole or not there; no pickle.

    step-00000100/  adapter_model.safetensors + adapter_config.json   (lora)  or  model.safetensors  (full training):
                        the trainable parameters in float32
                    optimizer.safetensors    the optimizer's state, by parameter name
                    state.json               step, data position, totals, config hash, fingerprint of the frozen base
                    MANIFEST.json            sha256 of each file; written last

Written to a temporary folder, each file and the folder flushed to disk, then renamed once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm_dist.distributed import Ranks
from vlm_dist.errors import CheckpointError
from vlm_dist.training.engine import trainable

MANIFEST = "MANIFEST.json"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
MAKE_ROOM = "Make room, then run the same command again to continue"
logger = logging.getLogger(__name__)


def save_checkpoint(folder: Path, engine: Any, step: int, state: dict[str, Any], keep_last: int, ranks: Ranks) -> Path:
    """Write `folder/step-XXXXXXXX` and delete all but the newest `keep_last`. Every rank must call it.

    Args:
        state: what else is needed to continue; JSON.

    Raises:
        CheckpointError: it cannot be written. The earlier checkpoints are untouched.
    """
    from safetensors import SafetensorError

    path = folder / f"step-{step:08d}"
    weights = gather_weights(engine)
    moments = _optimizer_state(engine)
    if ranks.is_first:
        temporary = folder / f".{path.name}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            _write_files(temporary, engine.module, weights, moments, {"step": step, **state})
            _write_manifest(temporary)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            _flush(folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            left = find_checkpoints(folder)
            kept = f"the last good one, {left[0]}, is intact" if left else "there is no earlier one"
            raise CheckpointError(f"checkpoint {path}: cannot be written, {why_not_written(error)}; {kept}. {MAKE_ROOM}") from None
        for old in find_checkpoints(folder)[keep_last:]:
            shutil.rmtree(old, ignore_errors=True)
    ranks.barrier()
    return path


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the highest step first (by number: clocks may be wrong)."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def verify_checkpoint(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of its manifest must be there with its sha256."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, digest in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) != digest:
            return f"{name} is damaged (its sha256 differs from {MANIFEST})"
    return None


def newest_good_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named in the log and passed over.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    found = find_checkpoints(folder)
    for path in found:
        problem = verify_checkpoint(path)
        if problem is None:
            return path
        logger.warning("%s: %s; falling back to the checkpoint before it", path, problem)
    if found:
        raise CheckpointError(f"{folder}: none of the {len(found)} checkpoints is whole; move the folder away to start anew")
    return None


def load_checkpoint(path: Path, engine: Any, fingerprint: str) -> dict[str, Any]:
    """Put weights and optimizer state back into the engine, at any ZeRO stage and number of ranks.

    Returns:
        The checkpoint's state.

    Raises:
        CheckpointError: it was trained on another base model, or does not fit the model.
    """
    from safetensors.torch import load_file

    state = json.loads((path / "state.json").read_text())
    if state["base_fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{path}: was trained on another base model than model.name loads now; put the old base back, or start a run of another name"
        )
    weights = load_file(next(path / name for name in WEIGHTS if (path / name).exists()))
    moments = load_file(path / "optimizer.safetensors")
    parameters = trainable(engine)
    stored = _stored_names(engine.module, parameters)
    if set(stored.values()) != set(weights):
        odd = sorted(set(stored.values()) ^ set(weights))
        raise CheckpointError(
            f"{path}: holds other parameters than this model trains ({len(odd)} differ, e.g. {odd[0]}); was lora changed?"
        )
    for name, parameter in parameters.items():
        _set_parameter(engine, parameter, weights[stored[name]])
    _set_optimizer_state(engine, moments, int(state["step"]))
    return state


def gather_weights(engine: Any) -> dict[str, Any]:
    """The trainable parameters by name, whole, float32, on the CPU. Every rank must call it."""
    return {name: _full_parameter(engine, parameter) for name, parameter in trainable(engine).items()}


def _write_files(folder: Path, module: Any, weights: dict[str, Any], moments: dict[str, Any], state: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    adapter = getattr(module, "peft_config", None)
    names = _stored_names(module, weights)
    stored = {names[name]: tensor.contiguous() for name, tensor in weights.items()}
    save_file(stored, folder / WEIGHTS[0 if adapter else 1], {"format": "pt"})
    save_file(moments, folder / "optimizer.safetensors", {"format": "pt"})
    if adapter:
        adapter["default"].save_pretrained(str(folder))
    (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n")


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for file in files:
        _flush(file)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"version": 1, "sha256": {file.name: _sha256(file) for file in files}}, indent=1) + "\n")
    _flush(manifest)
    _flush(folder)


def _stored_names(module: Any, names: Iterable[str]) -> dict[str, str]:
    """The name under which each trainable parameter is stored: for adapters, the one that PEFT itself would give it."""
    import torch

    names = list(names)
    if not hasattr(module, "peft_config"):
        return {name: name for name in names}
    from peft import get_peft_model_state_dict

    numbered = {name: torch.tensor(number) for number, name in enumerate(names)}
    stored = get_peft_model_state_dict(module, state_dict=numbered, save_embedding_layers=False)
    return {names[int(number)]: name for name, number in stored.items()}


def _is_sharded(engine: Any) -> bool:
    return engine.zero_optimization_stage() > 0


def _full_parameter(engine: Any, parameter: Any) -> Any:
    from deepspeed.utils import safe_get_full_fp32_param

    value = safe_get_full_fp32_param(parameter) if _is_sharded(engine) else parameter.detach()
    assert value is not None
    return value.float().cpu().clone()


def _set_parameter(engine: Any, parameter: Any, value: Any) -> None:
    """Set the working weight and, where ZeRO keeps one apart from it, the master weight."""
    import torch
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    stage = engine.zero_optimization_stage()
    if stage:
        safe_set_full_fp32_param(parameter, value.to(engine.device))
    with GatheredParameters([parameter], modifier_rank=0, enabled=stage == 3), torch.no_grad():
        parameter.copy_(value)


def _optimizer_state(engine: Any) -> dict[str, Any]:
    """ "PARAMETER/KEY" -> tensor. Without sharding: all tensors that the optimizer keeps; with: the two moments, gathered."""
    import torch
    from deepspeed.utils import safe_get_full_optimizer_state

    state = {}
    for name, parameter in trainable(engine).items():
        if _is_sharded(engine):
            entries = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
        else:
            entries = engine.optimizer.state[parameter]
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                state[f"{name}/{key}"] = value.detach().cpu().clone().contiguous()
    return state


def _set_optimizer_state(engine: Any, state: dict[str, Any], step: int) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    parameters = trainable(engine)
    sharded = _is_sharded(engine)
    if sharded:
        _create_moments(engine)
    for key, value in state.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        if not sharded:
            engine.optimizer.state[parameter][entry] = value if value.ndim == 0 else value.to(parameter.device)
        elif entry in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(parameter, value.to(engine.device), entry)
    optimizer = engine.optimizer.optimizer if sharded else engine.optimizer
    for entries in optimizer.state.values():
        _set_count(entries, step)


def _create_moments(engine: Any) -> None:
    """ZeRO's inner optimizer makes its moments in its first step; a checkpoint is put back before that (DeepSpeed 0.19)."""
    import torch

    zero = engine.optimizer
    flats = zero.fp32_partitioned_groups_flat if engine.zero_optimization_stage() == 3 else zero.single_partition_of_fp32_groups
    for flat in flats:
        zero.optimizer.state[flat] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    if engine.zero_optimization_stage() < 3:
        zero._lazy_init_hp_params_optimizer_state()


def _set_count(entries: dict[str, Any], step: int) -> None:
    """The number of updates done, from which Adam corrects its bias: torch keeps a tensor, bitsandbytes an int."""
    import torch

    entries["step"] = torch.tensor(float(step)) if isinstance(entries.get("step"), torch.Tensor) else step


def why_not_written(error: Exception) -> str:
    """The reason in words. safetensors hides the error number in its message."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    return "the disk is full" if full else str(error).splitlines()[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
