"""Decoding of videos beside bare PyAV in one run, whether workers see the same frames, and memory over very many clips.

    python scripts/bench/video.py --out docs/benchmarks/video.json

speed    clips of several kinds, two frames a second of each: seconds through `open_clip` and `shown`, and by PyAV's own loop, which
         decodes from the beginning, turns the same frames into RGB and passes over the others: with the conversion that gives the same
         pixels on every machine, as ours (`bare_exact`), and with its default, whose pixels depend on the CPU (`bare`); `ratio` is
         bare_exact's seconds over ours, `ratio_to_inexact` bare's
workers  the same clips through a stream of Qwen2.5-VL with 1 and with 3 workers: a digest of all pixels and tokens of each
memory   the resident bytes of this process while 5,000 clips are decoded one after another, looked at every 100; flat: the median of the
         last tenth is no more than 16 MiB above that of the second tenth (in the first, libraries take what they keep)
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # there kernels.py would hide Hugging Face's package `kernels`

import argparse
import hashlib
import io
import json
import os
import statistics
import tempfile
import time
from fractions import Fraction
from functools import partial
from typing import Any

import av
import numpy as np
import psutil
import torch
from av.video.reformatter import Interpolation

from vlm_dist import distributed
from vlm_dist.config import DataConfig, VideoConfig
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.shards import write_shard
from vlm_dist.data.stream import open_stream
from vlm_dist.data.video import open_clip
from vlm_dist.environment import describe_environment
from vlm_dist.run_dir import write_json
from vlm_dist.testing import tiny_checkpoint

EXACT = int(Interpolation.BICUBIC) | int(Interpolation.ACCURATE_RND) | int(Interpolation.BITEXACT) | int(Interpolation.FULL_CHR_H_INT)
LOOK, FLAT = 100, 16 * 2**20
CONFIG = VideoConfig(fps=2, max_frames=64, max_pixels=10**7)  # no frame is made smaller: both do the same
KINDS = {
    "10 s, 360p, H.264": {"seconds": 10, "size": (640, 360), "gop": 250},
    "60 s, 360p, H.264, a keyframe every 2 s": {"seconds": 60, "size": (640, 360), "gop": 48},
    "10 s, 720p, H.264": {"seconds": 10, "size": (1280, 720), "gop": 250},
    "10 s, 360p, VP9": {"seconds": 10, "size": (640, 360), "gop": 250, "form": "webm", "codec": "libvpx-vp9"},
}


def make(*, seconds: int, size: tuple[int, int], gop: int, form: str = "mp4", codec: str = "libx264", fps: int = 24) -> bytes:
    """Moving stripes with noise."""
    noise, buffer = np.random.default_rng(0).integers(0, 30, (size[1], size[0], 3), np.uint8), io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps, options={"cpu-used": "8"} if form == "webm" else {"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = *size, "yuv420p", gop
        stripes = (np.arange(size[0]) // 16 % 2 * 120).astype(np.uint8)
        for number in range(seconds * fps):
            pixels = noise + np.roll(stripes, 2 * number)[None, :, None]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def ours(data: bytes) -> torch.Tensor:
    return open_clip(data, "clip", 10**8).shown(CONFIG).frames


def bare(data: bytes, **exact: Any) -> torch.Tensor:
    """The same frames by PyAV's loop; `exact`: with what makes their pixels the same on every machine."""
    frames, shown = [], 0
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        seconds = container.duration / av.time_base
        count = min(round(seconds * CONFIG.fps), CONFIG.max_frames)
        for frame in container.decode(stream):
            if shown < count and frame.time >= seconds * shown / count - 1e-6:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1, **exact)).permute(2, 0, 1))
                shown += 1
    return torch.stack(frames)


def measure_speed(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, kind in KINDS.items():
        data = make(**kind)
        assert len(ours(data)) == len(bare(data))
        times: dict[str, list[float]] = {"ours": [], "bare": [], "bare_exact": []}
        for _ in range(repeats):  # by turns: the machine has other work too
            for which, decode in (("ours", ours), ("bare", bare), ("bare_exact", partial(bare, interpolation=EXACT))):
                before = time.process_time()
                decode(data)
                times[which].append(time.process_time() - before)
        fastest = {which: min(found) for which, found in times.items()}
        rows.append({
            "clip": name, "bytes": len(data), "frames": len(ours(data)), "seconds": {k: round(v, 4) for k, v in fastest.items()},
            "median_seconds": {which: round(statistics.median(found), 4) for which, found in times.items()},
            "ratio": round(fastest["bare_exact"] / fastest["ours"], 3), "ratio_to_inexact": round(fastest["bare"] / fastest["ours"], 3),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_workers(folder: Path) -> dict[str, Any]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_checkpoint("qwen2_5_vl", folder / "model"))
    turns = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "left"}]}
    clips = [make(seconds=2 + number % 3, size=(160 + 32 * (number % 4), 96), gop=12 + number) for number in range(12)]
    write_shard(folder / "a.tar", [{"__key__": f"{n:03d}", "mp4": d, "json": json.dumps(turns).encode()} for n, d in enumerate(clips)])
    found = {}
    for workers in (1, 3):
        config = DataConfig(train=[str(folder / "a.tar")], video=VideoConfig(max_frames=8), workers=workers, max_seq_length=4096)
        quarantine = Quarantine(folder / "q.jsonl", 0)
        stream = open_stream(config, processor, quarantine, seed=0, global_batch=4, micro_batch=2, rank=0, world_size=1)
        digest = hashlib.sha256()
        for _ in range(6):
            for batch in stream.next_step().micro_batches:
                for name in sorted(batch):
                    digest.update(batch[name].numpy().tobytes())
        stream.close()
        found[str(workers)] = digest.hexdigest()
    return {"digests": found, "same": len(set(found.values())) == 1}


def measure_memory(count: int) -> dict[str, Any]:
    """Clips of many sizes and forms in turn, so that no buffer fits the next one."""
    kinds = [{"seconds": 2 + n % 4, "size": (96 + 32 * (n % 5), 64 + 16 * (n % 3)), "gop": 12 + n} for n in range(20)]
    clips = [make(**kind, **({"form": "webm", "codec": "libvpx-vp9"} if n % 4 == 3 else {})) for n, kind in enumerate(kinds)]
    process, looks, frames = psutil.Process(), [], 0
    for number in range(count):
        frames += len(ours(clips[number * 7 % len(clips)]))
        if number % LOOK == LOOK - 1:
            looks.append(process.memory_info().rss)
    tenth = max(1, len(looks) // 10)
    growth = int(statistics.median(looks[-tenth:]) - statistics.median(looks[tenth : 2 * tenth]))
    return {"clips": count, "frames": frames, "rss_bytes": looks, "growth_bytes": growth, "is_flat": growth <= FLAT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clips", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "environment": describe_environment(distributed.Ranks(0, 0, 1, torch.device("cpu"))),
    }
    found["speed"] = {"clock": "seconds of the process's CPU time, the fastest of the repeats", "clips": measure_speed(arguments.repeats)}
    found["memory"] = measure_memory(arguments.clips)
    print(json.dumps(found["memory"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found["workers"] = measure_workers(Path(folder))
    print(json.dumps(found["workers"]), flush=True)
    if arguments.out:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
