"""Helper files of a run directory that a crash, a full disk or another program has spoiled: put aside and told, never in the way.

What can be read of a JSON-lines file stays; the file as it was is kept beside it. A last line that was cut off is what a kill leaves
behind, and goes without a word.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_dist.run_dir import RunDir, json_row, write_text

Needs = dict[str, type | tuple[type, ...]]
NUMBER = (int, float)
BEAT: Needs = {"started": NUMBER, "now": NUMBER, "step": int, "rank": int, "host": str, "pid": int, "doing": str, "beats": int}


def mend(run: RunDir, tell: Callable[[str], object]) -> None:
    """Make every helper file fit to be read and written again. Call it on the first rank while nobody else uses the directory.

    Raises:
        OSError: the directory cannot be written.
    """
    lines: dict[Path, Needs] = {
        run.metrics: {"step": int},
        run.events: {"step": int, "event": str, "text": str},
        run.quarantine: {"shard": str, "key": str, "reason": str},
        run.starts: {"started": NUMBER, "ended": NUMBER, "step": int},
    }
    for path, needs in lines.items():
        _mend_lines(path, needs, tell)
    if os.path.lexists(run.summary) and run.read_summary() is None:
        tell(f"{run.summary}: is damaged and is passed over; it is kept as {put_aside(run.summary).name}")
    for path in sorted(run.beat(0).parent.glob("rank-*.alive.json")):
        if not fits(_value(path), BEAT):
            tell(f"{path}: is damaged and is passed over; it is kept as {put_aside(path).name}")
    for rank_log in (run.log(0), run.report):
        if rank_log.is_dir():
            tell(f"{rank_log}: is a folder, expected a file; it is kept as {put_aside(rank_log).name}")
    for folder in (run.samples, run.log(0).parent):
        if os.path.lexists(folder) and not folder.is_dir():
            tell(f"{folder}: is no folder and is in the way; it is kept as {put_aside(folder).name}")


def put_aside(path: Path) -> Path:
    """Rename a file or folder to NAME.damaged-N, N the first free number."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    os.replace(path, aside)
    return aside


def fits(row: Any, needs: Needs) -> bool:
    """Whether it is a mapping with these keys, each of its type, and if it is an evaluation's, a whole one."""
    if not isinstance(row, dict):
        return False
    if not all(isinstance(row.get(key), kind) and not isinstance(row[key], bool) for key, kind in needs.items()):
        return False
    return "eval" not in row or (isinstance(row["eval"], dict) and row.get("phase") in ("before", "during", "after"))


def _mend_lines(path: Path, needs: Needs, tell: Callable[[str], object]) -> None:
    if not os.path.lexists(path):
        return
    content = _content(path)
    if content is None:
        tell(f"{path}: cannot be read and is begun anew; it is kept as {put_aside(path).name}")
        return
    whole, _, cut = content.rpartition(b"\n")
    rows = [json_row(line) for line in whole.split(b"\n")] if whole else []
    bad = [number for number, row in enumerate(rows, 1) if not fits(row, needs)]
    last = json_row(cut)
    if not bad and not cut:
        return
    if bad:
        told = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        tell(f"{path}: line {told} cannot be read and is left out; the file as it was is kept as {put_aside(path).name}")
    kept = [row for row in [*rows, last] if fits(row, needs)]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _value(path: Path) -> Any:
    content = _content(path)
    return None if content is None else json_row(content)
