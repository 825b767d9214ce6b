"""linear_cross_entropy on a CPU against the usual way, in one run: time in turn, peak memory each in a process of its own.

    python scripts/bench/cross_entropy_cpu.py --out docs/benchmarks/cross_entropy_cpu.json

The usual way: F.cross_entropy(head(hidden)), forward and backward to the hidden states; the head is frozen, as in QLoRA.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import vlm_kernels
from vlm_dist import distributed
from vlm_dist.environment import describe_environment
from vlm_dist.run_dir import write_json


def inputs(rows: int, hidden: int, vocabulary: int, supervised: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn((rows, hidden), generator=generator).requires_grad_(True)
    weight = torch.randn((vocabulary, hidden), generator=generator) * 0.02
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) >= supervised] = -100
    return h, weight, labels


def usual(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(h @ weight.T, labels, ignore_index=-100, reduction="sum")


def ours(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return vlm_kernels.linear_cross_entropy(h, weight, labels)[0]


WAYS: dict[str, Callable] = {"usual": usual, "ours": ours}


def seconds(way: Callable, data: tuple) -> float:
    start = time.perf_counter()
    way(*data).backward()
    data[0].grad = None
    return time.perf_counter() - start


def peak_bytes(name: str, sizes: tuple, queue) -> None:
    data = inputs(*sizes)
    seconds(WAYS[name], inputs(4, 8, 16, 1.0))  # load what the first call loads
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    seconds(WAYS[name], data)
    queue.put(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes in memory now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = []
    context = multiprocessing.get_context("spawn")
    for supervised in (0.1, 0.5, 1.0):
        sizes = (arguments.rows, arguments.hidden, arguments.vocabulary, supervised)
        data = inputs(*sizes)
        loss = [float(way(*data)) for way in WAYS.values()]
        times = {name: [] for name in WAYS}
        for _ in range(arguments.rounds):
            for name, way in WAYS.items():
                times[name].append(seconds(way, data))
        peaks = {}
        for name in WAYS:
            queue = context.Queue()
            process = context.Process(target=peak_bytes, args=(name, sizes, queue))
            process.start()
            peaks[name] = queue.get()
            process.join()
        row = {
            "rows": arguments.rows, "hidden": arguments.hidden, "vocabulary": arguments.vocabulary, "supervised": supervised,
            "losses": loss, "seconds": times, "peak_bytes": peaks,
            "time_ratio": statistics.median(times["ours"]) / statistics.median(times["usual"]),
            "memory_ratio": peaks["ours"] / peaks["usual"],
        }  # fmt: skip
        results.append(row)
        median = {name: statistics.median(found) for name, found in times.items()}
        mib = {name: peak / 2**20 for name, peak in peaks.items()}
        print(
            f"{supervised:4.0%} supervised: {median['ours']:.3f} s against {median['usual']:.3f} s ({row['time_ratio']:.2f}), "
            f"{mib['ours']:.0f} MiB against {mib['usual']:.0f} MiB ({row['memory_ratio']:.2f})"
        )
    if arguments.out:
        write_json(arguments.out, {"environment": describe_environment(distributed.start()), "results": results})
        print(json.dumps({"written": str(arguments.out)}))


if __name__ == "__main__":
    main()
