"""Whether the files of an adapter or a trained model are those that were saved: their sha256 stand in vlm_dist.json beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm_dist.errors import ModelError

RECORD = "vlm_dist.json"
FREE = {RECORD, "README.md"}  # may be written anew
ADAPTER_CONFIG = "adapter_config.json"
MAY_CHANGE = ("base_model_name_or_path", "revision")  # of adapter_config.json: where the base is now
REMEDY = f"copy it again, run the training's command again to export it anew, or delete {RECORD} to load it unchecked"


def check_files(folder: Path) -> None:
    """Compare a folder with its record; one without (of others, or of an earlier vlm_dist) is not compared.

    Raises:
        ModelError: a file is missing or is not the one that was saved, or the record is damaged.
    """
    if (problem := problem_of(folder)) is not None:
        raise ModelError(f"{problem}; {REMEDY}")


def problem_of(folder: Path) -> str | None:
    """What is wrong with the files of a folder that has a record."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known = {**record.get("sha256", {})}
        own = record.get("record_sha256")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{path}: is damaged ({error})"
    if own is not None and own != record_digest(record):
        return f"{path}: is damaged (it is not what was saved)"
    for name, digest in sorted(known.items()):
        file = folder / name
        if Path(name).name != name or not file.is_file():
            return f"{file}: is missing"
        if _digest(file) != digest:
            return f"{file}: is damaged (its sha256 differs from {RECORD})"
    return None


def digests_of(folder: Path) -> dict[str, str]:
    """sha256 of each file, by name."""
    return {file.name: _digest(file) for file in sorted(folder.iterdir()) if file.is_file() and file.name not in FREE}


def record_digest(record: dict[str, Any]) -> str:
    """sha256 of a record's own values, without where the base is, which may be corrected by hand."""
    said = {name: value for name, value in record.items() if name != "record_sha256"}
    if isinstance(base := said.get("base"), dict):
        said["base"] = {name: value for name, value in base.items() if name not in ("name", "revision")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file of an adapter.

    Raises:
        ModelError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: is damaged ({error}); {REMEDY}") from None


def _digest(path: Path) -> str:
    """Of adapter_config.json without what may be corrected by hand."""
    if path.name == ADAPTER_CONFIG:
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            said = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
        except (ValueError, AttributeError):
            return "damaged"
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
