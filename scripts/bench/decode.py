"""JPEG decoders and resizes, one thread, in memory: why the stream decodes with simplejpeg and hands tensors to the processor.

    python scripts/bench/decode.py --rounds 5 --out docs/benchmarks/decode.json

Pictures of two sizes are decoded, and decoded and made 336 x 336, by each way in turn, round after round; what is shown is the median
over rounds of pictures a second, and of its ratio to Pillow's in the same round.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import numpy as np
import simplejpeg
import torch
from PIL import Image

from vlm_dist import distributed
from vlm_dist.environment import describe_environment
from vlm_dist.run_dir import write_json

SIDE = 336
SIZES = ((384, 304), (1440, 1080))


def pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def turbo(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, strict=True)


def by_pillow(pixels: np.ndarray) -> Any:
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def by_torch(pixels: np.ndarray) -> Any:
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(tensor, (SIDE, SIDE), mode="bicubic", antialias=True)


WAYS: dict[str, Callable[[bytes], Any]] = {
    "Pillow": pillow,
    "simplejpeg": turbo,
    "Pillow, resized by Pillow": lambda data: by_pillow(pillow(data)),
    "simplejpeg, resized by Pillow": lambda data: by_pillow(turbo(data)),
    "Pillow, resized by torch": lambda data: by_torch(pillow(data)),
    "simplejpeg, resized by torch": lambda data: by_torch(turbo(data)),
}
BESIDE = {way: "Pillow, resized by Pillow" if "resized" in way else "Pillow" for way in WAYS}


def make_jpegs(size: tuple[int, int], count: int) -> list[bytes]:
    """Photograph-like: coarse noise, enlarged."""
    generator, found = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88)
        found.append(buffer.getvalue())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in SIZES:
        jpegs = make_jpegs(size, arguments.pictures)
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way, work in WAYS.items():
                start = time.perf_counter()
                for data in jpegs:
                    work(data)
                speeds[way].append(len(jpegs) / (time.perf_counter() - start))
        for way, found in speeds.items():
            ratio = statistics.median(one / other for one, other in zip(found, speeds[BESIDE[way]], strict=True))
            rows.append({"size": size, "way": way, "pictures_per_s": statistics.median(found), "ratio": ratio, "of": BESIDE[way]})
            print(f"{size[0]:5} x {size[1]:<5} {way:32} {rows[-1]['pictures_per_s']:8.0f} a second  {ratio:5.2f} of {BESIDE[way]}")
    if arguments.out:
        write_json(arguments.out, {"environment": describe_environment(distributed.start()), "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
