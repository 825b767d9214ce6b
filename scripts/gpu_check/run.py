"""Runs the parts of scripts/gpu_check.sh, each in a process of its own and skipped when its JSON is there, and shows what they found."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from part import ROOT, describe_machine

BUDGETS = {  # seconds on one H100; a part leaves out what does not fit, and is stopped after half as much again
    "machine": 20, "tested": 70, "tiny": 150, "profiled": 30, "memory": 60, "speed": 150, "pieces": 60, "several": 120,
}  # fmt: skip
VERDICTS = ("wrong", "slow", "skipped", "right")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("--name", help="folder below docs/benchmarks/gpu; default: the card's name")
    parser.add_argument("--out", type=Path, help="another folder for the JSON files")
    parser.add_argument("--parts", nargs="+", choices=tuple(BUDGETS), default=list(BUDGETS), metavar="PART", help=", ".join(BUDGETS))
    parser.add_argument("--again", action="store_true", help="run parts that are done, too")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; writes to a temporary folder")
    return parser.parse_args(argv)


def folder_of(arguments: argparse.Namespace, gpus: list[str]) -> Path:
    if arguments.out:
        return arguments.out
    if arguments.dry_run:
        return Path(tempfile.mkdtemp(prefix="gpu_check-"))
    name = arguments.name or re.sub(r"[^a-z0-9]+", "-", gpus[0].split(",")[0].lower()).strip("-").removeprefix("nvidia-")
    return ROOT / "docs" / "benchmarks" / "gpu" / name


def is_done(path: Path, dry: bool) -> bool:
    """Whether a part went to its end, on a card or, where `dry`, without one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return not {"failed", "unfinished"} & content.keys() and content.get("dry_run") is dry


def run_part(part: str, path: Path, dry: bool) -> None:
    """Run one; what kills it is written in its place, and it is run again next time."""
    command = [sys.executable, f"scripts/gpu_check/{part}.py", "--out", str(path), "--budget", str(BUDGETS[part]), *["--dry-run"] * dry]
    begun = time.monotonic()
    path.unlink(missing_ok=True)
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        ended = f"exit code {process.wait(BUDGETS[part] * 1.5 + 30)}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {time.monotonic() - begun:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it left running would disturb the next part
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if not is_done(path, dry):
        _told_as_unfinished(part, path, ended, time.monotonic() - begun)


def _told_as_unfinished(part: str, path: Path, ended: str, seconds: float) -> None:
    """Beside what the part had found by then."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = {"part": part, "machine": describe_machine(), "checks": []}
    checks = [*content["checks"], {"verdict": "wrong", "name": part, "found": f"did not come to its end: {ended}"}]
    path.write_text(json.dumps({**content, "failed": True, "seconds": round(seconds, 1), "checks": checks}, indent=1) + "\n")


def show(folder: Path, parts: list[str]) -> int:
    """The table; how many findings are wrong."""
    rows = []
    for part in parts:
        content = json.loads((folder / f"{part}.json").read_text())
        rows += [(check["verdict"], part, check["name"], check["found"]) for check in content["checks"]]
        print(f"{part:10} {content['seconds']:6.1f} s", end="   ")
    print("\n")
    for verdict, part, name, found in sorted(rows, key=lambda row: VERDICTS.index(row[0])):
        print(f"{verdict:8} {part:9} {name:44} {found[:110]}")
    counts = {verdict: sum(row[0] == verdict for row in rows) for verdict in VERDICTS}
    print("\n" + ", ".join(f"{number} {verdict}" for verdict, number in counts.items()) + f"; raw results: {folder}")
    return counts["wrong"]


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    gpus = describe_machine()["gpus"]
    if not gpus and not arguments.dry_run:
        print("gpu_check: nvidia-smi names no GPU here; --dry-run goes through all of it on the CPU", file=sys.stderr)
        return 2
    folder = folder_of(arguments, gpus)
    folder.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        path = folder / f"{part}.json"
        if is_done(path, arguments.dry_run) and not arguments.again:
            print(f"== {part}: done before ({path})", flush=True)
        else:
            print(f"== {part}", flush=True)
            run_part(part, path, arguments.dry_run)
    print()
    return 1 if show(folder, arguments.parts) else 0


if __name__ == "__main__":
    sys.exit(main())
