"""`vlm-dist checkpoints`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlm_dist.cli.parsers import new_parser
from vlm_dist.errors import CheckpointError, ConfigError
from vlm_dist.run_dir import RunDir


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands, "checkpoints", "List a run's checkpoints; verify or prune them.", "vlm-dist checkpoints runs/quickstart --verify"
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument("--verify", action="store_true", help="compare every file with its sha256; exit code 5 if one is damaged")
    parser.add_argument("--prune", metavar="N", type=int, help="delete all but the newest N")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.checkpoints.form import find_checkpoints, prune

    folder = RunDir(arguments.run_dir).checkpoints
    if not folder.is_dir():
        raise ConfigError(f"{arguments.run_dir}: no run with checkpoints; give a run directory such as runs/quickstart")
    if arguments.prune is not None:
        if arguments.prune < 1:
            raise ConfigError(f"--prune {arguments.prune}: at least the newest checkpoint is kept; to remove all, delete {folder}")
        for path in prune(folder, arguments.prune):
            print(f"deleted {path}")
        return 0
    rows = [_describe(path, verify=arguments.verify) for path in find_checkpoints(folder)]
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        _show(rows)
    return CheckpointError.exit_code if any(row["problem"] for row in rows) else 0


def _describe(path: Path, *, verify: bool) -> dict[str, Any]:
    from vlm_dist.checkpoints.form import read_state, verify_checkpoint

    problem = verify_checkpoint(path) if verify else None
    try:
        state = read_state(path)
    except CheckpointError as error:
        state, problem = {}, problem or str(error).partition(": ")[2]
    except (OSError, ValueError):
        state, problem = {}, problem or "state.json is missing or unreadable"
    return {
        "path": str(path),
        "step": int(path.name.removeprefix("step-")),
        "saved": path.stat().st_mtime,
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
        "samples": state.get("progress", {}).get("samples"),
        "scores": state.get("scores"),
        "verified": verify,
        "problem": problem,
    }


def _show(rows: list[dict[str, Any]]) -> None:
    from datetime import datetime

    print(f"{'checkpoint':<16}{'saved':<18}{'samples':>12}{'MB':>11}  state")
    for row in rows:
        saved = datetime.fromtimestamp(row["saved"]).strftime("%Y-%m-%d %H:%M")
        samples = "" if row["samples"] is None else f"{row['samples']:,}"
        state = row["problem"] or ("whole" if row["verified"] else "not verified (--verify)")
        scores = "".join(f", {name} {value:.3g}" for name, value in (row["scores"] or {}).items() if isinstance(value, float))
        print(f"{Path(row['path']).name:<16}{saved:<18}{samples:>12}{row['bytes'] / 1e6:>11,.1f}  {state}{scores}")
