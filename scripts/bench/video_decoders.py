"""The two decoders that a video can be read with from memory, in one run: PyAV, by which this project decodes, and torchcodec.

    pip install torchcodec && apt-get install ffmpeg    # it brings no FFmpeg, PyAV does
    python scripts/bench/video_decoders.py --out docs/benchmarks/video_decoders.json

speed    two frames a second of whole clips: seconds of CPU time, the fastest of the repeats; `ratio` is torchcodec's over ours
seek     opening a clip of two minutes and decoding two frames one second before its end
wrong    frames asked for by time of a clip with an irregular frame rate (20 to 200 ms a frame, B-frames), each of which shows its number:
         how many are another frame than the last one that began by then; and how many clips end in an error
memory   how much a process that decodes 16 frames of 1080p grows at its peak
torchcodec in both of its modes: `exact` reads the whole file once to know each frame's time, `approximate` trusts the header.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # there kernels.py would hide Hugging Face's package `kernels`

import argparse
import io
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import av
import numpy as np
import torch

from vlm_dist import distributed
from vlm_dist.config import VideoConfig
from vlm_dist.data.video import Span, open_clip
from vlm_dist.environment import describe_environment
from vlm_dist.run_dir import write_json

BITS = 12  # of a frame's number, as stripes
CONFIG = VideoConfig(fps=2, max_frames=64, max_pixels=10**7)  # no frame is made smaller
WAYS = ("ours", "exact", "approximate")
CLIPS = {
    "10 s, 360p, H.264": {"seconds": 10, "size": (640, 360), "gop": 250},
    "60 s, 360p, H.264, a keyframe every 2 s": {"seconds": 60, "size": (640, 360), "gop": 48},
    "10 s, 720p, H.264": {"seconds": 10, "size": (1280, 720), "gop": 250},
    "10 s, 360p, VP9": {"seconds": 10, "size": (640, 360), "gop": 250, "form": "webm", "codec": "libvpx-vp9"},
}


def striped(number: int, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3]: the bits of a number from left to right, black or white."""
    bits = np.array([number >> bit & 1 for bit in range(BITS)], np.uint8) * 255
    row = bits[np.arange(size[0]) * BITS // size[0]]
    return np.broadcast_to(row[None, :, None], (size[1], size[0], 3))


def number_in(frame: torch.Tensor) -> int:
    """Of a frame [3, H, W]."""
    width = frame.shape[2]
    return sum(int(frame[:, :, (2 * bit + 1) * width // (2 * BITS)].float().mean() > 127) << bit for bit in range(BITS))


def make(times: list[float], size: tuple[int, int], gop: int, form: str = "mp4", codec: str = "libx264") -> bytes:
    """Frames that show their numbers over noise, each from its time on."""
    noise, buffer = np.random.default_rng(0).integers(0, 30, (size[1], size[0], 3), np.uint8), io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=24, options={"cpu-used": "8"} if form == "webm" else {"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = *size, "yuv420p", gop
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, begin in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.maximum(striped(number, size), noise), format="rgb24")
            frame.pts, frame.time_base = round(begin * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def regular(seconds: int) -> list[float]:
    return [number / 24 for number in range(24 * seconds)]


def decode(way: str, data: bytes, config: VideoConfig = CONFIG, span: tuple[float, float] | None = None) -> torch.Tensor:
    """[T, 3, H, W] uint8: the frames at the times that the project chooses."""
    part = Span(Fraction(span[0]), Fraction(span[1])) if span else Span()
    clip = open_clip(data, "clip", 10**8, part)
    if way == "ours":
        return clip.shown(config).frames
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]

    decoder = VideoDecoder(data, seek_mode=way, num_ffmpeg_threads=1)
    begin = decoder.metadata.begin_stream_seconds or 0.0
    return decoder.get_frames_played_at([begin + float(part.start + one) for one in clip.times(config)]).data


def fastest(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of CPU time, by turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            before = time.process_time()
            call()
            times[name].append(time.process_time() - before)
    return {name: round(min(found), 4) for name, found in times.items()}


def compare(data: bytes, repeats: int, span: tuple[float, float] | None = None) -> dict[str, Any]:
    seconds = fastest({way: partial(decode, way, data, CONFIG, span) for way in WAYS}, repeats)
    return {"seconds": seconds, "ratio": {way: round(seconds[way] / seconds["ours"], 3) for way in WAYS[1:]}}


def wrong_frames(clips: int) -> dict[str, Any]:
    """Of how many frames, how many each way gets wrong, and at how many clips it fails."""
    dice, asked = np.random.default_rng(1), 0
    wrong, failed, config = dict.fromkeys(WAYS, 0), dict.fromkeys(WAYS, 0), VideoConfig(fps=7.3, max_frames=400, max_pixels=10**7)
    for _ in range(clips):
        times = np.round(np.concatenate([[0], np.cumsum(dice.uniform(0.02, 0.2, 120))]), 3).tolist()
        data = make(times, (192, 64), 30)
        chosen = [float(one) for one in open_clip(data, "clip", 10**8).times(config)]
        truth = [int(np.searchsorted(times, one + 1e-9, "right")) - 1 for one in chosen]
        asked += len(truth)
        for way in WAYS:
            try:
                frames = decode(way, data, config)
            except (IndexError, RuntimeError):  # torchcodec's, of a frame that it expected
                failed[way] += 1
                continue
            wrong[way] += sum(number_in(frame) != right for frame, right in zip(frames, truth, strict=True))
    return {"clips": clips, "frames": asked, "wrong": wrong, "failed_clips": failed}


def _peak(way: str, data: bytes, answer: Any) -> None:
    decode(way, make(regular(1), (64, 64), 12))  # what the libraries take for themselves
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decode(way, data, VideoConfig(fps=2, max_frames=16, max_pixels=10**7))
    answer.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def peak_memory() -> dict[str, int]:
    """MiB of each way, in a process of its own."""
    data, found, context = make(regular(8), (1920, 1080), 48), {}, multiprocessing.get_context("fork")
    for way in WAYS:
        here, there = context.Pipe()
        process = context.Process(target=_peak, args=(way, data, there))
        process.start()
        there.close()  # so that the end of the process ends the wait
        found[way] = here.recv() // 1024
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clips", type=int, default=20, help="with an irregular frame rate")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    try:
        import torchcodec  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError) as error:
        raise SystemExit(
            f"torchcodec cannot be used: {str(error).splitlines()[0]}; pip install torchcodec, apt-get install ffmpeg"
        ) from None
    torch.set_num_threads(1)
    found: dict[str, Any] = {"environment": describe_environment(distributed.Ranks(0, 0, 1, torch.device("cpu")))}
    found |= {"torchcodec": torchcodec.__version__, "av": av.__version__, "speed": []}
    for name, kind in CLIPS.items():
        data = make(regular(kind.pop("seconds")), **kind)
        found["speed"].append({"clip": name, **compare(data, arguments.repeats)})
        print(json.dumps(found["speed"][-1]), flush=True)
    found["seek"] = compare(make(regular(120), (320, 240), 48), arguments.repeats, (118.5, 119.5))
    found["wrong_frames"], found["peak_mib"] = wrong_frames(arguments.clips), peak_memory()
    print(json.dumps({name: found[name] for name in ("seek", "wrong_frames", "peak_mib")}), flush=True)
    if arguments.out:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
