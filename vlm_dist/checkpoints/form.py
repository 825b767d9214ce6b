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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.errors import CheckpointError

MANIFEST = "MANIFEST.json"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
MAKE_ROOM = "Make room, then run the same command again to continue"
logger = logging.getLogger(__name__)


@dataclass
class Snapshot:
    """A copy that training does not touch any more."""

    weights: dict[str, Any]
    """float32, by the name under which each is stored."""
    moments: dict[str, Any]
    """ "PARAMETER/KEY" -> tensor of the optimizer's state."""
    adapter: Any
    """The PEFT configuration; None in full training."""


def write_checkpoint(folder: Path, step: int, snapshot: Snapshot, state: dict[str, Any]) -> Path:
    """Write `folder/step-XXXXXXXX`.

    Args:
        state: what else is needed to continue; JSON.

    Raises:
        CheckpointError: it cannot be written. The earlier checkpoints are untouched.
    """
    from safetensors import SafetensorError

    path = folder / f"step-{step:08d}"
    temporary = folder / f".{path.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write_files(temporary, snapshot, {"step": step, **state})
        _write_manifest(temporary)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        left = find_checkpoints(folder)
        kept = f"the last good one, {left[0]}, is intact" if left else "there is no earlier one"
        raise CheckpointError(f"checkpoint {path}: cannot be written, {why_not_written(error)}; {kept}. {MAKE_ROOM}") from None
    return path


def prune(folder: Path, keep_last: int, keep_best: int = 0, metric: str = "exact_match", *, lower_is_better: bool = False) -> list[Path]:
    """Delete all checkpoints but the newest `keep_last` and the `keep_best` with the best score.

    Returns:
        What was deleted.
    """
    found = find_checkpoints(folder)
    scored = [path for path in found if score_of(path, metric) is not None]
    best = sorted(scored, key=lambda path: score_of(path, metric) or 0.0, reverse=not lower_is_better)[:keep_best]
    gone = [path for path in found[keep_last:] if path not in best]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return gone


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that verifies."""
    return json.loads((path / "state.json").read_text())


def score_of(path: Path, metric: str) -> float | None:
    """What the evaluation at this checkpoint's step gave; None without one."""
    try:
        return (read_state(path).get("scores") or {}).get(metric)
    except (OSError, ValueError):
        return None


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


def _write_files(folder: Path, snapshot: Snapshot, state: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(snapshot.weights, folder / WEIGHTS[0 if snapshot.adapter else 1], {"format": "pt"})
    save_file(snapshot.moments, folder / "optimizer.safetensors", {"format": "pt"})
    if snapshot.adapter:
        snapshot.adapter.save_pretrained(str(folder))
    (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n")


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for file in files:
        _flush(file)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"version": 1, "sha256": {file.name: _sha256(file) for file in files}}, indent=1) + "\n")
    _flush(manifest)
    _flush(folder)


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
