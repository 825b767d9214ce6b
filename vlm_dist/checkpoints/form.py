"""Checkpoints: one portable form whatever the ZeRO stage and the number of ranks; whole or not there; no pickle.

    step-00000100/  adapter_model.safetensors + adapter_config.json   (lora)  or  model.safetensors  (full training):
                        the trainable parameters in float32
                    optimizer.safetensors    the optimizer's state, by parameter name
                    state.json               step, data position, totals, config hash, fingerprint of the frozen base
                    MANIFEST.json            sha256 of each file; written last

Written to a temporary folder, each file and the folder flushed to disk, then renamed once. What is learnt later of the same step (the
scores of its evaluation) is added to state.json; meanwhile the manifest knows both contents, so that it is whole at every moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.checkpoints.contents import problem_of
from vlm_dist.disk import again, readable_as_others, why
from vlm_dist.errors import CheckpointError

MANIFEST = "MANIFEST.json"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
MOMENTS = "optimizer.safetensors"
STATE = "state.json"
STATE_VERSION = 3
MANIFEST_VERSION = 1
OF_STATE = {"step": int, "progress": dict, "data": dict, "health": dict, "patience": dict, "base_fingerprint": str}  # what is needed
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
        _write_files(temporary, snapshot, {"step": step, "version": STATE_VERSION, **state})
        readable_as_others(temporary)
        _write_manifest(temporary)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        left = find_checkpoints(folder)
        kept = f"the last good one, {left[0]}, is intact" if left else "there is no earlier one"
        raise CheckpointError(f"checkpoint {path}: cannot be written, {why(error)}; {kept}. {again(error)}") from None
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
    for path in gone:  # a kill leaves no half of one under its name
        with contextlib.suppress(OSError):
            os.replace(path, path.with_name(f".{path.name}.partial"))
    for partial in folder.glob(".step-*.partial"):
        if found and _step_of(partial) <= _step_of(found[0]):  # a later one is being written
            shutil.rmtree(partial, ignore_errors=True)
    return gone


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that verifies.

    Raises:
        CheckpointError: it is of another version.
    """
    state = _json_of(path / STATE)
    version = state["version"] if isinstance(state, dict) and "version" in state else None
    if version != STATE_VERSION:
        raise CheckpointError(
            f"{path}: {STATE} is of version {version}, this vlm_dist reads version {STATE_VERSION}; continue with the vlm_dist that wrote "
            "it, or start a run of another name"
        )
    return state


def amend_state(path: Path, changes: dict[str, Any], sent: Callable[[Path], object] = lambda file: None) -> None:
    """Change values of a whole checkpoint's state.json; None removes one. It is whole at every moment.

    Args:
        sent: is told each file that was changed, in order.

    Raises:
        CheckpointError: it cannot be written; the checkpoint is as it was.
    """
    manifest, file = path / MANIFEST, path / STATE
    try:
        before = _json_of(manifest)
        state = {**_json_of(file), **changes}
        text = json.dumps({name: value for name, value in state.items() if value is not None or name not in changes}, indent=1) + "\n"
        after = {**before, "sha256": {**before["sha256"], STATE: hashlib.sha256(text.encode()).hexdigest()}}
        _replace(manifest, json.dumps({**after, "before": {STATE: before["sha256"][STATE]}}, indent=1) + "\n")
        sent(manifest)
        _replace(file, text)
        sent(file)
        _replace(manifest, json.dumps(after, indent=1) + "\n")
        sent(manifest)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: its scores cannot be added, {why(error)}; it is intact. {again(error)}") from None


def kept_in_words(folder: Path) -> str:
    """What is left to go on from."""
    found = find_checkpoints(folder)
    return f"the last checkpoint, {found[0].name}, is intact" if found else "no checkpoint was saved yet"


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
    """What is wrong with a checkpoint, or None: every file that one needs must be in its manifest, and be there with its sha256; and
    state.json must hold what continuing needs."""
    try:
        manifest = _json_of(path / MANIFEST)
        files, before = {**manifest["sha256"]}, {**manifest.get("before", {})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    if manifest.get("version") != MANIFEST_VERSION:
        return f"{MANIFEST} is of version {manifest.get('version')}, expected {MANIFEST_VERSION}"
    if lacking := _lacking(files):
        return f"{lacking} is not in {MANIFEST}"
    for name, digest in files.items():
        if Path(name).name != name or name in ("..", "."):
            return f"{MANIFEST} names a file elsewhere ({name!r})"
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sha256(path / name) not in (digest, before.get(name)):
            return f"{name} is damaged (its sha256 differs from {MANIFEST})"
    return _problem_of_state(path)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2].removesuffix(".partial"))


def _lacking(files: dict[str, Any]) -> str | None:
    """A file that a checkpoint cannot do without."""
    weights = [name for name in WEIGHTS if name in files]
    if len(weights) != 1:
        return " or ".join(WEIGHTS) if not weights else f"one of {' and '.join(WEIGHTS)} too many: it"
    needed = [MOMENTS, STATE, *(["adapter_config.json"] if weights[0] == WEIGHTS[0] else [])]
    return next((name for name in needed if name not in files), None)


def _problem_of_state(path: Path) -> str | None:
    """What continuing would miss. Another version is no damage: `read_state` refuses it."""
    try:
        state = _json_of(path / STATE)
    except ValueError:
        return f"{STATE} is no JSON"
    if not isinstance(state, dict):
        return f"{STATE} holds no state"
    if state.get("version") != STATE_VERSION:
        return None
    odd = next((name for name, kind in OF_STATE.items() if not isinstance(state.get(name), kind)), None)
    if odd is not None:
        return f"{STATE} holds no '{odd}'"
    if state["step"] != _step_of(path):
        return f"{STATE} is of step {state['step']}"
    problem = problem_of(state)
    return problem and f"{STATE}: {problem}"


def newest_good_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named in the log and passed over.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged; or the newest is of another version.
    """
    found = find_checkpoints(folder)
    for path in found:
        problem = verify_checkpoint(path)
        if problem is None:
            read_state(path)  # going back behind one of another version would lose what it holds
            return path
        logger.warning("%s: %s; falling back to the checkpoint before it", path, problem)
    if found:
        raise CheckpointError(f"{folder}: none of the {len(found)} checkpoints is whole; move the folder away to start anew")
    return None


def _write_files(folder: Path, snapshot: Snapshot, state: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(snapshot.weights, folder / WEIGHTS[0 if snapshot.adapter else 1], {"format": "pt"})
    save_file(snapshot.moments, folder / MOMENTS, {"format": "pt"})
    if snapshot.adapter:
        snapshot.adapter.save_pretrained(str(folder))
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for file in files:
        _flush(file)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"version": MANIFEST_VERSION, "sha256": {file.name: _sha256(file) for file in files}}, indent=1) + "\n")
    _flush(manifest)
    _flush(folder)


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all, and flush it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


def _json_of(path: Path) -> Any:
    """Raises:
    ValueError: it holds no JSON.
    OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deep") from None


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
