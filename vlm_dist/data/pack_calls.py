"""A folder of shards remembers the call that made it: the same call again finds it done, or goes on; another one is refused."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_dist.errors import DataError
from vlm_dist.run_dir import read_json, write_text

UNFINISHED = ".unfinished"  # folder in OUT while shards are being written
DONE = "packed.json"
READ_WHOLE = 1 << 26  # bytes; a larger source is known by when it was last written


def describe_source(source: str) -> dict[str, Any]:
    """Where records come from, and what changes when they are written anew."""
    path = Path(source)
    named = [path] if path.exists() else sorted(map(Path, glob.glob(source, recursive=True)))
    if not named:  # on a hub
        return {"source": source}
    files = [file for one in named for file in ([one] if one.is_file() else sorted(part for part in one.rglob("*") if part.is_file()))]
    status = [file.stat() for file in files]
    size = sum(one.st_size for one in status)
    if size <= READ_WHOLE:
        state = {"sha256": hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()}
    else:
        state = {"written": max((one.st_mtime_ns for one in status), default=0)}
    return {"source": str(path.resolve()), "files": len(files), "bytes": size, **state}


def done_before(out: Path, about: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any] | None:
    """What the same call made, if all of it is there; that is told."""
    known = _known(out)
    if known is None or known["call"] != about or (out / UNFINISHED).exists():
        return None
    names = [name for part in known["made"].values() for name in part["shards"]]
    if not all((out / name).is_file() for name in names):
        return None
    tell(f"{out} holds what this call makes, and the source has not changed since: nothing to do")
    return known["made"]


def _known(out: Path) -> dict[str, Any] | None:
    """The call that the folder remembers, and what it made; None: none, or none that can be understood."""
    found = read_json(out / DONE)
    whole = isinstance(found, dict) and isinstance(found.get("call"), dict) and isinstance(found.get("made"), dict)
    return found if whole else None


def begin(out: Path, about: dict[str, Any]) -> Path:
    """The folder of what is under way; one of the same call before is continued, and what of its shards is gone is made again.

    Raises:
        DataError: other shards are there; says what differs.
    """
    unfinished = out / UNFINISHED
    note = unfinished / "call.json"
    known = read_json(note) or (_known(out) or {}).get("call")
    if note.exists() and known == about:
        return unfinished
    present = sorted(out.glob("train-*.tar")) + sorted(out.glob("heldout-*.tar"))
    if present and known != about:
        changed = [f"{key}: {known.get(key)} -> {about.get(key)}" for key in about if known.get(key) != about[key]] if known else []
        of = f" ({'; '.join(changed)})" if changed else ""
        raise DataError(f"data pack: {present[0]} is there already, of another call{of}; use another folder, or delete it")
    unfinished.mkdir(parents=True, exist_ok=True)
    write_text(note, json.dumps(about))
    return unfinished


def remember(out: Path, about: dict[str, Any], made: dict[str, Any]) -> None:
    """All is there."""
    write_text(out / DONE, json.dumps({"call": about, "made": made}, indent=1) + "\n")
