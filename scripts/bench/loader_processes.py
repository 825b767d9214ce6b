"""What preparing samples costs a loop that is bound by its launches: `data.processes` false and true, in turn, on cores of their own.

    python scripts/bench/loader_processes.py --out docs/benchmarks/loader_processes.json

The main thread, on one core, does operations as small as a launch; a stream runs flat out on the others (synthetic pictures of 336 pixels,
LLaVA's processor). Counted are the operations a second beside nothing, beside the stream's threads, and beside its processes, and the
stream's samples a second. Rounds take turns, and the median counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from vlm_dist import distributed
from vlm_dist.config import DataConfig
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.stream import Stream, open_stream
from vlm_dist.data.synthetic import synthesise
from vlm_dist.environment import describe_environment
from vlm_dist.run_dir import write_json
from vlm_dist.testing.full_size import full_size_config

WAYS = ("alone", "threads", "processes")


def launch_rate(seconds: float) -> float:
    """Operations a second."""
    x, begin, done = torch.zeros(16), time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        for _ in range(200):
            x.add_(1)
        done += 200
    return done / spent


def beside(stream: Stream | None, cores: set[int], seconds: float) -> tuple[float, float]:
    """Operations a second of this thread, and samples a second of a stream that runs on those cores."""
    if stream is None:
        return launch_rate(seconds), 0.0
    ready, ended, samples = threading.Event(), threading.Event(), 0

    def drain() -> None:
        nonlocal samples
        os.sched_setaffinity(threading.get_native_id(), cores)  # what it starts inherits that
        steps = stream.steps()
        for number, step in enumerate(steps):
            if number == 2:
                ready.set()
            samples += step.counts.samples * ready.is_set()
            if ended.is_set():
                steps.close()
                return

    thread = threading.Thread(target=drain)
    thread.start()
    ready.wait()
    before, begin = samples, time.perf_counter()
    rate = launch_rate(seconds)
    per_s = (samples - before) / (time.perf_counter() - begin)
    ended.set()
    thread.join()
    stream.close()
    return rate, per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from transformers import AutoProcessor

    first, *others = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        processor = AutoProcessor.from_pretrained(full_size_config("llava-1.5-7b", folder / "model"))
        files = synthesise(folder / "shards", train=400, heldout=0, tasks=("caption",), size=336, seed=0)
        config = DataConfig(train=[str(path) for path in files["caption-train"]], workers=arguments.workers)

        def stream(way: str) -> Stream | None:
            if way == "alone":
                return None
            quarantine, batch = Quarantine(folder / "quarantine.jsonl", 0.1), {"global_batch": 8, "micro_batch": 8}
            opened = open_stream(config, processor, quarantine, seed=0, **batch, rank=0, world_size=1)
            opened.in_processes = way == "processes"
            return opened

        os.sched_setaffinity(0, {first})
        rounds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _, way in itertools.product(range(arguments.rounds), WAYS):
            rounds[way].append(beside(stream(way), set(others), arguments.seconds))
    alone = statistics.median(rate for rate, _ in rounds["alone"])
    asked = f"--seconds {arguments.seconds:g} --rounds {arguments.rounds} --workers {arguments.workers}"
    result: dict[str, Any] = {
        "command": f"scripts/bench/loader_processes.py {asked}",
        "operations_per_s_alone": alone,
        "results": {
            way: {"share_of_operations": statistics.median(rate for rate, _ in rounds[way]) / alone,
                  "samples_per_s": statistics.median(per_s for _, per_s in rounds[way])}
            for way in WAYS[1:]
        },
        "rounds": rounds,
        "environment": describe_environment(distributed.alone()),
    }  # fmt: skip
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
