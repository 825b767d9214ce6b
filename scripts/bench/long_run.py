"""A run of very many steps that are as small as the trainer allows: memory, open files and threads of its process must stay flat.

    python scripts/bench/long_run.py --steps 100000 --minutes 50 --out docs/benchmarks/long_run.json

A tiny LLaVA with LoRA trains one short question a step, saves every 1,000 steps and scores two held-out samples every 5,000. Every two
seconds its process is looked at. When the minutes are over it gets SIGTERM, saves and ends: the result says how many steps there were.
What counts as flat: between the first and the last tenth of the looks, without those before the first save and evaluation are over,
the median of each number grows by no more than the limits below.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from vlm_dist.data.synthetic import synthesise
from vlm_dist.distributed import alone
from vlm_dist.environment import describe_environment
from vlm_dist.run_dir import write_json
from vlm_dist.testing import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"rss_bytes": 32 * 2**20, "open_files": 1, "threads": 1, "children": 0}
SAVE_EVERY, EVALUATE_EVERY = 1_000, 5_000


def settings(folder: Path, steps: int) -> dict[str, Any]:
    made = synthesise(folder / "data", train=60, heldout=4, tasks=("qa",), seed=0, size=32, shard_size=20)
    tiny_checkpoint("llava", folder / "base")
    return {
        "name": "long", "output_dir": str(folder / "runs"),
        "model": {"name": str(folder / "base"), "load_in_4bit": False, "dtype": "float32"}, "lora": {"r": 2},
        "data": {
            "train": [str(path) for path in made["qa-train"]], "heldout": [str(path) for path in made["qa-heldout"]],
            "max_seq_length": 128, "shuffle_window": 20, "prefetch": 2, "workers": 1,
        },
        "optim": {"lr": 1e-4},
        "training": {"steps": steps, "global_batch": 1, "micro_batch": 1},
        "evaluation": {"every": EVALUATE_EVERY, "samples": 2, "max_new_tokens": 2},
        "checkpoint": {"save_every": SAVE_EVERY}, "log": {"every": 1_000, "wandb": "disabled"},
    }  # fmt: skip


def last_step(metrics: Path) -> int:
    """Of the last whole line; the file is not read to its beginning."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 8192))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def look(process: psutil.Process, metrics: Path, started: float) -> dict[str, Any] | None:
    try:
        with process.oneshot():
            return {
                "seconds": round(time.monotonic() - started, 1), "step": last_step(metrics), "rss_bytes": process.memory_info().rss,
                "open_files": process.num_fds(), "threads": process.num_threads(), "children": len(process.children(recursive=True)),
            }  # fmt: skip
    except psutil.NoSuchProcess:
        return None


def watch(config: Path, folder: Path, minutes: float) -> tuple[list[dict[str, Any]], int]:
    """Train; what was seen, and the exit code."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(config)]
    seen, started = [], time.monotonic()
    with (folder / "log.txt").open("w") as log:
        training = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        process, told = psutil.Process(training.pid), False
        while training.poll() is None:
            time.sleep(2)
            row = look(process, folder / "runs" / "long" / "metrics.jsonl", started)
            seen += [row] if row and row["step"] else []
            if not told and time.monotonic() - started > 60 * minutes:
                told = True
                training.terminate()
    if training.returncode not in (0, 143):
        raise SystemExit(f"long run: exit code {training.returncode}: {(folder / 'log.txt').read_text()[-2000:]}")
    return seen, training.returncode


def growth(seen: list[dict[str, Any]]) -> dict[str, float]:
    """Of each number, from the first to the last tenth."""
    settled = [row for row in seen if row["step"] > min(EVALUATE_EVERY, seen[-1]["step"] // 10)]
    tenth = max(1, len(settled) // 10)
    first, last = settled[:tenth], settled[-tenth:]
    return {name: statistics.median(row[name] for row in last) - statistics.median(row[name] for row in first) for name in LIMITS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.yaml").write_text(json.dumps(settings(folder, arguments.steps)))
        seen, code = watch(folder / "config.yaml", folder, arguments.minutes)
    grown, steps = growth(seen), seen[-1]["step"]
    is_flat = all(grown[name] <= most for name, most in LIMITS.items())
    found = {
        "what": "a process that trains very many tiny steps: memory, open files, threads and child processes over time",
        "command": f"python scripts/bench/long_run.py --steps {arguments.steps} --minutes {arguments.minutes:g}",
        "steps": steps, "steps_asked": arguments.steps, "exit_code": code, "seconds": seen[-1]["seconds"], "growth": grown,
        "limits": LIMITS, "is_flat": is_flat, "peak_rss_bytes": max(row["rss_bytes"] for row in seen),
        "looks": seen[:: max(1, len(seen) // 200)], "environment": describe_environment(alone()),
    }  # fmt: skip
    print(json.dumps({name: value for name, value in found.items() if name not in ("looks", "environment")}, indent=1))
    if arguments.out:
        write_json(arguments.out, found)
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
