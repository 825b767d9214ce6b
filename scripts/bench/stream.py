"""Samples a second of the stream, beside the ceiling of the same machine and the usual ways to read the same tars, in turn in one run.

    python scripts/bench/stream.py --rounds 3 --out docs/benchmarks/stream.json

Photograph-like JPEGs of several sizes in ten shards, read from the page cache by two workers (threads or processes):
  raw        bytes of every sample, one worker: nothing decoded
  ceiling    read, decode, resize to 336 x 336 in two processes, nothing handed over
  stream     our stream, with the same decoder and resize instead of a processor
  processor  our stream with LLaVA's processor (CLIP, 336 pixels) and tokens, two threads
  processes  the same, two processes (data.processes, which `auto` takes on a GPU)
  webdataset webdataset's own pipeline (shuffle, Pillow, the same resize) in a DataLoader of two workers
  datasets   Hugging Face datasets, streaming=True, in a DataLoader of two workers
Every number is samples a second; the shares of the ceiling are of the same round.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on as many cores; read when torch is imported

import numpy as np
import torch
from PIL import Image

from vlm_dist import distributed
from vlm_dist.config import DataConfig
from vlm_dist.data.dataset import Dataset, open_dataset
from vlm_dist.data.encode import Encoded
from vlm_dist.data.pictures import decode_pixels
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.samples import Sample
from vlm_dist.data.shards import read_in_order, write_shards
from vlm_dist.data.storage import Storage
from vlm_dist.data.stream import Stream, open_stream
from vlm_dist.data.tally import Tally
from vlm_dist.environment import describe_environment
from vlm_dist.run_dir import write_json

SIDE = 336
WORKERS = 2
SIZES = ((384, 304), (640, 480), (500, 375), (800, 600))  # what web data sets keep: 0.1 to 0.5 megapixels


def make_shards(folder: Path, count: int) -> list[str]:
    generator = np.random.default_rng(0)

    def samples() -> Iterator[dict]:
        for number in range(count):
            width, height = SIZES[number % len(SIZES)]
            coarse = Image.fromarray(generator.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
            turns = [
                {"role": "user", "content": "What is it? " * int(generator.integers(1, 6))},
                {"role": "assistant", "content": "Noise of many colours. " * int(generator.integers(1, 6))},
            ]
            yield {"__key__": f"{number:07d}", "jpg": buffer.getvalue(), "json": json.dumps({"messages": turns}).encode()}

    return [str(path) for path in write_shards(folder, "bench", samples(), samples_per_shard=max(1, count // 10))]


def resize(pixels: torch.Tensor) -> torch.Tensor:
    """[3, H, W] -> [3, SIDE, SIDE], uint8."""
    return torch.nn.functional.interpolate(pixels[None], (SIDE, SIDE), mode="bicubic", antialias=True)[0]


def from_pillow(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


class Light:
    """Stands where the stream has its encoder: resizes, and nothing else."""

    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    takes_pixels = True
    videos = SimpleNamespace(is_on=False)

    def __init__(self) -> None:
        self.tally = Tally()

    def lacking(self, _: list[Encoded]) -> None:
        """Every sample has a picture."""

    def encode(self, sample: Sample) -> Encoded:
        ids = torch.zeros((1, 1), dtype=torch.int64)
        return Encoded(sample.key, {"input_ids": ids, "pixel_values": resize(sample.images[0])[None]}, ids, ids)


def raw(shards: list[str], count: int) -> float:
    dataset = open_dataset(shards, "bench", Storage())
    start = time.perf_counter()
    for number in range(count):
        dataset.raw(number)
    return count / (time.perf_counter() - start)


def _decode_part(dataset: Dataset, part: int, begin, ended) -> None:
    numbers = range(part, len(dataset.index), WORKERS)
    resize(decode_pixels(dataset.raw(part)["jpg"], "jpg", 10**8))
    begin.wait()
    for number in numbers:
        resize(decode_pixels(dataset.raw(number)["jpg"], "jpg", 10**8))
    ended.wait()


def ceiling(shards: list[str], count: int) -> float:
    context = multiprocessing.get_context("fork")
    dataset = open_dataset(shards, "bench", Storage())
    begin, ended = context.Barrier(WORKERS + 1), context.Barrier(WORKERS + 1)
    parts = [context.Process(target=_decode_part, args=(dataset, part, begin, ended)) for part in range(WORKERS)]
    for process in parts:
        process.start()
    begin.wait()
    start = time.perf_counter()
    ended.wait()
    seconds = time.perf_counter() - start
    for process in parts:
        process.join()
    return count / seconds


def _rate(stream: Stream, count: int) -> float:
    for _ in range(8):
        stream.next_step()
    start, steps = time.perf_counter(), count // stream.global_batch
    for _ in range(steps):
        stream.next_step()
    seconds = time.perf_counter() - start
    stream.close()
    return steps * stream.global_batch / seconds


def ours(shards: list[str], count: int, processor=None, processes: bool = False) -> float:
    config = DataConfig(train=shards, workers=WORKERS, max_seq_length=4096, processes=processes)
    quarantine = Quarantine(Path(tempfile.mkdtemp()) / "q.jsonl", 0.01)
    batch = {"seed": 0, "global_batch": 32, "micro_batch": 32, "rank": 0, "world_size": 1}
    if processor is not None:
        return _rate(open_stream(config, processor, quarantine, **batch), count)
    return _rate(Stream([open_dataset(shards, "bench", Storage())], config, Light(), quarantine, **batch), count)  # pyright: ignore


def _loader_rate(dataset, count: int) -> float:
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, num_workers=WORKERS, prefetch_factor=4)
    batches = iter(loader)
    for _ in range(16):  # what was prepared while the workers started
        next(batches)
    start = time.perf_counter()
    seen = sum(len(batch) for batch in itertools.islice(batches, count // 32))
    return seen / (time.perf_counter() - start)


def plain_webdataset(shards: list[str], count: int) -> float:
    import webdataset as wds

    dataset = wds.WebDataset(shards, shardshuffle=10).repeat().shuffle(2000, initial=200).decode("pil").to_tuple("jpg", "json")
    return _loader_rate(dataset.map(lambda pair: resize(from_pillow(pair[0]))), count)


def streaming_datasets(shards: list[str], count: int) -> float:
    import datasets

    dataset = datasets.load_dataset("webdataset", data_files={"train": shards}, split="train", streaming=True)
    dataset = dataset.shuffle(seed=0, buffer_size=200)
    return _loader_rate(_Resized(dataset), count)


class _Resized(torch.utils.data.IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        while True:
            for sample in self.dataset:
                yield resize(from_pillow(sample["jpg"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder), arguments.samples)
        from vlm_dist.testing import tiny_checkpoint

        processor = large_llava(tiny_checkpoint("llava", Path(folder) / "llava"))
        ways: dict[str, Callable[[], float]] = {
            "raw": lambda: raw(shards, arguments.samples),
            "ceiling": lambda: ceiling(shards, arguments.samples),
            "stream": lambda: ours(shards, arguments.samples),
            "processor": lambda: ours(shards, arguments.samples, processor),
            "processes": lambda: ours(shards, arguments.samples, processor, processes=True),
            "webdataset": lambda: plain_webdataset(shards, arguments.samples),
            "datasets": lambda: streaming_datasets(shards, arguments.samples),
        }
        assert sum(1 for _ in read_in_order(shards)) == arguments.samples  # and now all of it is in the page cache
        rounds: list[dict[str, float]] = []
        for number in range(arguments.rounds):
            names = list(ways)[number % 2 :: 1] + list(ways)[: number % 2]
            rounds.append({name: round(ways[name](), 1) for name in names})
            print("  ".join(f"{name} {rounds[-1][name]:,.0f}" for name in ways), flush=True)
    shares = {name: round(statistics.median(one[name] / one["ceiling"] for one in rounds), 3) for name in ways}
    print("of the ceiling, median of the rounds: " + "  ".join(f"{name} {share:.2f}" for name, share in shares.items()))
    if arguments.out:
        environment = describe_environment(distributed.Ranks(0, 0, 1, torch.device("cpu")))
        about = {"samples": arguments.samples, "sizes": SIZES, "side": SIDE, "workers": WORKERS}
        write_json(arguments.out, {"environment": environment, **about, "rounds": rounds, "share_of_ceiling": shares})


def large_llava(path: Path):
    """The processor of a tiny LLaVA, at the picture size and token count of the real one."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(path)
    processor.image_processor.size, processor.image_processor.crop_size = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    processor.patch_size = 14
    return processor


if __name__ == "__main__":
    main()
