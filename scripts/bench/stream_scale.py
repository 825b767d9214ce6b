"""What the stream needs at sizes that no test machine holds, how full and how even its rows are, and whether its memory stays flat.

  python scripts/bench/stream_scale.py --out docs/benchmarks/stream_scale.json

index    a generated index of 10,000 shards with 10,000 samples each: bytes, seconds to load, memory, seconds a look-up, and seconds
         until any of 1,024 ranks knows its next 1,000 samples after a restart in the middle of the third epoch (no shard is read)
padding  a mixed data set (text alone, short captions, long answers, 1 to 4 pictures of many sizes) through the real stream with
         Qwen2.5-VL's processor at 8 ranks: share of computed tokens that are padding, and how far the rank with most tokens or vision
         patches is above the mean of the ranks (a step of 4 micro-batches a rank); packed, grouped by length, and padded as they come
memory   200,000 samples through one rank's stream: resident memory every 10,000, and its slope over the second half
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlm_dist import distributed
from vlm_dist.config import DataConfig
from vlm_dist.data.index import Index, read_index, write_index
from vlm_dist.data.lanes import Lane, Order
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.shards import write_shards
from vlm_dist.data.stream import Stream, merge_states, open_stream
from vlm_dist.environment import describe_environment
from vlm_dist.run_dir import write_json
from vlm_dist.testing import tiny_checkpoint

RANKS = 8
ROWS = 32  # of a step, over all ranks


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure_index(folder: Path) -> dict:
    shards, each = 10_000, 10_000
    generator = np.random.default_rng(0)
    starts = np.concatenate([np.cumsum(generator.integers(20, 400, each)).astype(np.uint32) for _ in range(shards)])
    counts, ends = np.full(shards, each), starts[each - 1 :: each] + 400
    names = [f"data/part-{number:05d}.tar" for number in range(shards)]
    path = folder / "index.safetensors"
    write_index(Index(names, ends.astype(np.int64) * 512, counts, ends.astype(np.uint32), starts), path)
    del starts
    before, start = resident(), time.perf_counter()
    index = read_index(path, "data/")
    order = Order(index.counts, 1024, 0, 2000)
    index.place(order.draw(0, 0)[1])
    load_s, held = time.perf_counter() - start, resident() - before
    numbers = generator.integers(0, len(index), 10_000).tolist()
    start = time.perf_counter()
    for number in numbers:
        index.place(number)
    lookup_s = (time.perf_counter() - start) / len(numbers)
    resumes = []
    for lane in generator.integers(0, 1024, 5).tolist():
        start = time.perf_counter()
        again = Lane(lane, [Order(index.counts, 1024, 0, 2000)], [1.0], 0, counts=[250_000])
        for _ in range(1000):
            draw = again.draw()
            assert draw is not None and draw.epoch == 2
            index.place(draw.number)
        resumes.append(time.perf_counter() - start)
    return {
        "shards": shards, "samples": len(index), "file_bytes": path.stat().st_size, "load_s": round(load_s, 2),
        "memory_bytes": held, "lookup_us": round(lookup_s * 1e6, 1), "resume_s": [round(second, 3) for second in resumes],
    }  # fmt: skip


def mixed_samples(count: int) -> Iterator[dict]:
    generator = np.random.default_rng(1)
    pictures = []
    for _ in range(24):
        width, height = (int(side) for side in generator.integers(6, 30, 2) * 28)
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=60)
        pictures.append(buffer.getvalue())
    for number in range(count):
        many = 0 if generator.random() < 0.2 else int(generator.integers(2, 5)) if generator.random() < 0.25 else 1
        words = int(generator.lognormal(2.5, 0.5) if generator.random() < 0.5 else generator.lognormal(4.5, 0.6))
        turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "seen " * max(1, words)}]
        chosen = [pictures[choice] for choice in generator.integers(0, len(pictures), many)]
        members = {f"{place}.jpg": picture for place, picture in enumerate(chosen)}
        yield {"__key__": f"{number:07d}", "json": json.dumps({"messages": turns}).encode(), **members}


def measure_padding(folder: Path, steps: int) -> dict:
    from transformers import AutoProcessor

    shards = [str(path) for path in write_shards(folder, "mixed", mixed_samples(6000), samples_per_shard=500)]
    processor = AutoProcessor.from_pretrained(tiny_checkpoint("qwen2_5_vl", folder / "qwen"))
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    forms = {"packed": {"packing": True}, "grouped": {"packing": True}, "padded": {}}
    found: dict = {}
    for form, options in forms.items():
        rows, micro_batch = (ROWS, 1) if form == "packed" else (4 * ROWS, 4)
        config = DataConfig(train=shards, max_seq_length=4096, **options)
        quarantine = Quarantine(folder / f"{form}.jsonl", 1.0)
        batch = {"seed": 0, "global_batch": rows, "micro_batch": micro_batch, "world_size": RANKS, "pack": form == "packed"}
        streams = [open_stream(config, processor, quarantine, **batch, rank=rank).steps() for rank in range(RANKS)]
        tokens, slots, state = 0, 0, None
        excess: dict[str, list[float]] = {"tokens": [], "patches": []}
        for _ in range(steps):
            parts = [next(stream) for stream in streams]
            tokens += sum(part.counts.tokens for part in parts)
            slots += sum(part.counts.slots for part in parts)
            for name, values in (("tokens", [p.counts.slots for p in parts]), ("patches", [p.counts.patches for p in parts])):
                excess[name].append(max(values) / statistics.fmean(values) - 1)
            state = {lane: where for part in parts for lane, where in part.lanes.items()}
        found[form] = {
            "rows": rows,
            "padding": round(1 - tokens / slots, 4),
            "fill": round(tokens / (steps * ROWS * 4096), 4) if form == "packed" else None,
            "excess_tokens": round(statistics.fmean(excess["tokens"]), 4),
            "excess_patches": round(statistics.fmean(excess["patches"]), 4),
            "state_bytes_a_lane": round(len(json.dumps(state)) / rows, 1),
        }
        print(form, found[form], flush=True)
    return {"ranks": RANKS, "steps": steps, "max_seq_length": 4096, **found}


def measure_memory(folder: Path, count: int) -> dict:
    from transformers import AutoProcessor

    def small() -> Iterator[dict]:
        for sample in mixed_samples(4000):
            yield {"__key__": sample["__key__"], "json": sample["json"], **{name: SMALL for name in sample if name.endswith("jpg")}}

    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "JPEG")
    SMALL = buffer.getvalue()
    shards = [str(path) for path in write_shards(folder, "small", small(), samples_per_shard=500)]
    processor = AutoProcessor.from_pretrained(tiny_checkpoint("llava", folder / "llava"))
    quarantine = Quarantine(folder / "memory.jsonl", 1.0)
    config = DataConfig(train=shards, max_seq_length=1024, packing=True)
    stream: Stream = open_stream(
        config, processor, quarantine, seed=0, global_batch=8, micro_batch=1, rank=0, world_size=1, pack=True
    )  # fmt: skip
    seen, curve, started = 0, [(0, resident())], time.perf_counter()
    while seen < count:
        seen += stream.next_step().counts.samples
        if seen // 10_000 > curve[-1][0] // 10_000:
            curve.append((seen, resident()))
    seconds, state = time.perf_counter() - started, merge_states([stream.state()])
    stream.close()
    half = np.array(curve[len(curve) // 2 :], dtype=np.float64)
    slope = float(np.polyfit(half[:, 0], half[:, 1], 1)[0])
    return {
        "samples": seen, "seconds": round(seconds, 1), "resident_bytes": curve, "slope_bytes_a_sample": round(slope, 2),
        "growth_over_second_half": round(slope * (half[-1, 0] - half[0, 0]) / half[0, 1], 4), "state_bytes": len(json.dumps(state)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("index", "padding", "memory"), default=["index", "padding", "memory"])
    parser.add_argument("--steps", type=int, default=20, help="of the padding measurement")
    parser.add_argument("--samples", type=int, default=200_000, help="of the memory measurement")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found: dict = {"environment": describe_environment(distributed.Ranks(0, 0, 1, torch.device("cpu")))}
    calls = {"index": (measure_index,), "padding": (measure_padding, arguments.steps), "memory": (measure_memory, arguments.samples)}
    for part in arguments.parts:
        call, *options = calls[part]
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found[part] = pool.submit(call, Path(folder), *options).result()  # in a process of its own: memory is looked at
        shown = {name: value for name, value in found[part].items() if name != "resident_bytes"}
        print(part, json.dumps(shown), flush=True)
    if arguments.out:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
