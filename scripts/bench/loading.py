"""How much of the host's memory ranks take while they load a checkpoint at ZeRO stage 3, against a whole copy a rank.

    python scripts/bench/loading.py --out docs/benchmarks/loading.json

Makes a LLaVA of random bfloat16 weights, and loads it in so many processes as training does (`vlm_dist.models.load`): whole, cut into
shares, and cut in NF4. Counted is the memory that is not of files (RssAnon), looked at every 2 ms, above what the process had before.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

FORMS = {"whole": (0, False), "in shares": (3, False), "in shares, NF4": (3, True)}


def make_checkpoint(folder: Path, megabytes: int) -> int:
    """Bytes of the weights of a LLaVA of about that size."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from vlm_dist.testing import tiny_checkpoint

    tiny_checkpoint("llava", folder)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.hidden_size, config.text_config.intermediate_size, config.text_config.num_attention_heads = 1024, 4096, 16
    config.text_config.num_key_value_heads, config.text_config.head_dim = 16, 64
    config.text_config.num_hidden_layers = max(1, megabytes * 10**6 // (2 * (4 * 1024**2 + 3 * 4096 * 1024)))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def own_memory() -> int:
    """Bytes of this process that are in memory and of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def load(folder: str, stage: int, load_in_4bit: bool) -> dict[str, float]:
    """In one of the ranks: what loading took at its height."""
    import torch

    from vlm_dist import distributed
    from vlm_dist.config import Config
    from vlm_dist.deepspeed_config import deepspeed_config, loads_sharded
    from vlm_dist.models.load import load_weights, read_model_config
    from vlm_dist.models.sharded import Sharding
    from vlm_dist.quiet import quiet_libraries

    quiet_libraries()
    ranks = distributed.start()
    config = Config.model_validate({
        "name": "loading", "data": {"train": "none.tar"}, "training": {"steps": 1, "global_batch": ranks.world_size, "micro_batch": 1},
        "model": {"name": folder, "dtype": "bfloat16", "load_in_4bit": load_in_4bit}, "engine": {"zero_stage": stage},
    })  # fmt: skip
    zero = deepspeed_config(config, ranks.world_size, torch.bfloat16)
    sharding = Sharding.of(config, zero) if loads_sharded(config, ranks.world_size) else None
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401

    _, family = read_model_config(config.model, folder)
    before = peak = own_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    model = load_weights(config.model, folder, family, ranks.device, lora=config.lora, sharding=sharding)
    seconds, kept = time.monotonic() - start, own_memory() - before
    done.set()
    watcher.join()
    ranks.barrier()
    del model
    return {"peak": peak - before, "kept": kept, "seconds": round(seconds, 2)}


def in_ranks(folder: Path, ranks: int, stage: int, load_in_4bit: bool) -> list[dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    words = [sys.executable, __file__, "--as-rank", str(folder), str(stage), str(int(load_in_4bit))]
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    started = [subprocess.Popen(words, env={**os.environ, **group, **place}, stdout=subprocess.PIPE, text=True) for place in places]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("\n".join(said))
    return [json.loads(text.splitlines()[-1]) for text in said]


def measure(megabytes: int, ranks: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        size = make_checkpoint(Path(folder), megabytes)
        rows = []
        for form, (stage, load_in_4bit) in FORMS.items():
            found = in_ranks(Path(folder), ranks, stage, load_in_4bit)
            together = sum(one["peak"] for one in found)
            rows.append({"form": form, "ranks": found, "of_whole_copies": round(together / (ranks * size), 3)})
            print(f"{form}: {together / 1e6:.0f} MB at most in {ranks} ranks, {rows[-1]['of_whole_copies']} of {ranks} whole copies")
    return {"checkpoint_bytes": size, "ranks": ranks, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=590)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--as-rank", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        folder, stage, load_in_4bit = arguments.as_rank
        print(json.dumps(load(folder, int(stage), bool(int(load_in_4bit)))))
        return
    result = {"command": shlex.join(["python", *sys.argv]), **measure(arguments.megabytes, arguments.ranks)}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
