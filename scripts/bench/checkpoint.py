"""What a checkpoint costs the training, written beside it or not; and the time from a command to its first step under each launcher.

    python scripts/bench/checkpoint.py --out docs/benchmarks/checkpoint.json

A LLaVA of 16 million parameters is trained whole (190 MB of weights and moments in a checkpoint), saving at every fourth step, in turn with
checkpoint.write_async true and false. Then each launcher starts the same small run.
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

ROOT = Path(__file__).resolve().parents[2]
EVERY = 4


def prepare(folder: Path) -> Path:
    """Data, base model and configuration; returns the latter's path."""
    from vlm_dist.config import ScratchConfig
    from vlm_dist.data.synthetic import synthesise
    from vlm_dist.models.scratch import build_checkpoint

    settings = {"seed": 0, "size": 64, "image_format": "jpg", "shard_size": 40, "questions_per_picture": 2}
    shards = synthesise(folder / "data", train=40, heldout=1, tasks=("qa",), **settings)
    sizes = ScratchConfig(vision_width=256, language_width=512, vision_layers=4, language_layers=4)
    build_checkpoint(sizes, ["how many shapes are there?"] * 50, 0, folder / "base")
    config = {
        "name": "bench", "output_dir": str(folder / "runs"), "lora": None,
        "model": {"name": str(folder / "base"), "dtype": "float32", "load_in_4bit": False},
        "data": {"train": [str(path) for path in shards["qa-train"]], "max_seq_length": 256},
        "training": {"steps": 24, "global_batch": 8, "micro_batch": 4}, "checkpoint": {"save_every": EVERY},
        "log": {"wandb": "disabled", "every": 100},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def saving(config: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds that training stands still for a checkpoint, and of a step."""
    from vlm_dist import load_config, train
    from vlm_dist.run_dir import RunDir, read_jsonl

    found: dict[str, list[dict[str, float]]] = {"async": [], "sync": []}
    for number in range(rounds):
        for form in found:
            name = f"{form}-{number}"
            train(load_config(config, [f"name={name}", f"checkpoint.write_async={str(form == 'async').lower()}"]))
            run = RunDir(folder / "runs" / name)
            saves = [row for row in read_jsonl(run.events) if row["event"] == "checkpoint"][1:]
            steps = [row["step_s"] for row in read_jsonl(run.metrics) if "loss" in row]
            beside = [step for row, step in enumerate(steps, 1) if row > EVERY and row % EVERY == 1]  # while a checkpoint is written
            stall = [row["stall_s"] + (row["write_s"] if form == "sync" else 0) for row in saves]
            found[form].append({
                "stall_s": statistics.median(stall), "write_s": statistics.median(row["write_s"] for row in saves),
                "step_s": statistics.median(steps[EVERY:]), "step_after_save_s": statistics.median(beside),
                "bytes": sum(file.stat().st_size for file in (run.checkpoints / "step-00000024").iterdir()),
            })  # fmt: skip
    return {form: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for form, rows in found.items()}


def starting(config: Path, folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds from the command to the first line of metrics.jsonl."""
    beside = Path(sys.executable).parent
    training = ["launch/train.py", "--config", str(config)]
    commands = {
        "python": [sys.executable, *training],
        "torchrun, 2 ranks": [str(beside / "torchrun"), "--standalone", "--nproc-per-node", "2", *training],
        "deepspeed, 2 ranks": [str(beside / "deepspeed"), "--num_gpus", "2", *training],
        "ray, 2 workers": [sys.executable, "launch/ray_train.py", *training[1:], "ray.workers=2"],
    }
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{beside}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds):
        for place, (name, command) in enumerate(commands.items()):
            run = f"start-{number}-{place}"
            begin = time.monotonic()
            options = [f"name={run}", "training.steps=2", "checkpoint.save_every=0"]
            process = subprocess.Popen(
                [*command, *options], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            metrics = folder / "runs" / run / "metrics.jsonl"
            while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
                time.sleep(0.05)
            seconds[name].append(time.monotonic() - begin)
            if process.wait():
                raise SystemExit(f"{name} ended with {process.returncode}")
    return {name: round(statistics.median(times), 2) for name, times in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    from vlm_dist import distributed
    from vlm_dist.environment import describe_environment
    from vlm_dist.quiet import quiet_libraries
    from vlm_dist.run_dir import write_json

    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = prepare(folder)
        starts = starting(config, folder, arguments.rounds)
        saves = saving(config, folder, arguments.rounds)
    for form, row in saves.items():
        stood = f"training stood still for {row['stall_s']:.3f} s, {row['stall_s'] / row['step_s']:.0%} of a step"
        print(f"{form:5}: {row['bytes'] / 1e6:.0f} MB; {stood}; written in {row['write_s']:.3f} s")
    for name, seconds in starts.items():
        print(f"{name:20} first step after {seconds:.1f} s")
    if arguments.out:
        environment = describe_environment(distributed.start())
        write_json(arguments.out, {"command": " ".join(sys.argv), "saving": saves, "starting_s": starts, "environment": environment})
    return 0


if __name__ == "__main__":
    sys.exit(main())
