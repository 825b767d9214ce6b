"""Where a checkpoint comes from: a folder or a hub id; and in words why one cannot be loaded."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from vlm_dist.errors import ModelError


def check_source(name: str) -> None:
    """Refuse a folder without a checkpoint; needs no heavy library.

    Raises:
        ModelError: `name` is a path, and there is no config.json.
    """
    if looks_like_path(name) and not (Path(name) / "config.json").is_file():
        raise ModelError(
            f"model.name: '{name}' holds no checkpoint (no config.json there); "
            "give a folder with one, or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct"
        )


def looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or os.path.exists(name)


def is_there(name: str, revision: str | None = None) -> bool:
    """Whether a folder or hub id is there, or can be had from the hub."""
    return Path(name).exists() if looks_like_path(name) else _cached(name, "config.json", revision) is not None


def weight_files(name: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a folder, or of a hub id (from the local cache, else downloaded).

    Raises:
        ModelError: there are none.
    """
    if looks_like_path(name):
        files = sorted(Path(name).glob("*.safetensors"))
        if not files:
            raise not_loadable(name, FileNotFoundError("no safetensors file in it"))
        return files
    index = _read_file(name, "model.safetensors.index.json", revision)
    names = sorted(set(json.loads(index)["weight_map"].values())) if index else ["model.safetensors"]
    found = [_cached(name, file, revision) for file in names]
    if None in found:
        raise not_loadable(name, FileNotFoundError(f"{names[found.index(None)]} is not there"))
    return [Path(path) for path in found if path is not None]


def fingerprint(name: str, revision: str | None = None) -> str:
    """A hash of every stored tensor's name, type, shape and some of its bytes: tells one base model from another in a moment, however
    it will be loaded."""
    digest = hashlib.sha256()
    entries = [entry for path in weight_files(name, revision) for entry in _describe_tensors(path)]
    for entry in sorted(entries):
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def read_config_file(name: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder or hub id, as it is stored; empty where there is none."""
    text = _read_file(name, "config.json", revision)
    return json.loads(text) if text else {}


def brings_code(name: str, revision: str | None = None) -> bool:
    """Whether the model's code lies beside its weights."""
    return "auto_map" in read_config_file(name, revision)


def not_loadable(name: str, error: Exception) -> ModelError:
    """One line for what a library raised while loading `name`."""
    if "trust_remote_code" in str(error):
        return ModelError(
            f"model.name: '{name}' would run Python code that comes with it ({_code_of(name)}); read that code, "
            "and set model.trust_remote_code: true if you trust it"
        )
    if looks_like_path(name):
        if pickles := _pickles(Path(name)):
            return ModelError(
                f"model.name: '{name}' holds its weights as pickle ({pickles[0]}), which can run any code when it is read; "
                "convert them to safetensors first (load with transformers on a machine you can lose, then save_pretrained)"
            )
        return ModelError(f"model.name: the checkpoint in '{name}' cannot be loaded: {_first_line(error)}")
    return ModelError(f"model.name: '{name}' is no folder here and cannot be had from the hub: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _pickles(folder: Path) -> list[str]:
    """Names of pickled weight files, where there is nothing safe beside them."""
    if any(folder.glob("*.safetensors")):
        return []
    return sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))


def _code_of(name: str) -> str:
    """The classes that a checkpoint's auto_map names, read from its JSON files alone."""
    found: dict[str, str] = {}
    for file in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        try:
            text = _read_file(name, file)
            auto_map = json.loads(text).get("auto_map", {}) if text else {}
        except ValueError:
            continue  # its own loader will speak of it
        found.update({kind: value if isinstance(value, str) else str(value[-1]) for kind, value in auto_map.items()})
    return ", ".join(f"{kind}: {value}" for kind, value in sorted(found.items())) or "its auto_map could not be read"


def _read_file(name: str, file: str, revision: str | None = None) -> str | None:
    path = _cached(name, file, revision)
    return Path(path).read_text(encoding="utf-8") if path else None


def _cached(name: str, file: str, revision: str | None) -> str | None:
    """The path of a checkpoint's file, downloaded if need be; None where there is no such file."""
    from transformers.utils.hub import cached_file

    return cached_file(
        name, file, revision=revision, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )


def _describe_tensors(path: Path) -> list[tuple[str, str, list[int], bytes]]:
    """(name, type, shape, bytes at start and middle) of each tensor of a safetensors file, read from its header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        found = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            samples = b""
            for position in (start, (start + end) // 2):
                file.seek(8 + size + position)
                samples += file.read(min(64, end - position))
            found.append((name, entry["dtype"], entry["shape"], samples))
        return found
