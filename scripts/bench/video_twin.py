"""A small Qwen2.5-VL learns from synthetic clips what no single frame tells; its twin that is shown one frame of each stays at chance.

    python scripts/bench/video_twin.py --out docs/benchmarks/video_twin.json

Clips of `vlm-dist data synth --tasks video`, questions about direction and order alone. Both models begin with the same random weights and
see the same clips in the same order; only `data.video.max_frames` differs. Asked are scenes that neither has seen, the answers as
`vlm-dist eval` scores them: exactly right or not. Chance is what the best guess gets that sees nothing: the share of the most frequent
answer among the held-out questions of a kind; of order, whose questions name two colours, that of the one named first, or second.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # there kernels.py would hide Hugging Face's package `kernels`

import argparse
import json
import os
import random
import tempfile
import time
from collections import Counter
from typing import Any

import torch

from vlm_dist import load_config, train
from vlm_dist.data.shards import write_shards
from vlm_dist.data.synthetic_shapes import COLOURS, SHAPES
from vlm_dist.data.synthetic_video import DIRECTIONS, Scene, question, video_sample
from vlm_dist.distributed import alone
from vlm_dist.environment import describe_environment
from vlm_dist.run_dir import read_json, write_json
from vlm_dist.testing.qwen import qwen

KINDS = ("direction", "order")
SIZE, FRAMES = 56, 8
VISION = {
    "depth": 2, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 128, "fullatt_block_indexes": [1],
}  # fmt: skip
TEXT = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}


def write_clips(folder: Path, split: str, count: int, seed: int) -> tuple[list[str], dict[str, float]]:
    """Shards of clips with one question each, and by kind the share of the most frequent answer to the words of the question."""
    rng, said = random.Random(f"{seed}/{split}"), {kind: Counter[str]() for kind in KINDS}

    def samples():
        for number in range(count):
            clip, (kind, asked, answer) = video_sample(rng, split, SIZE, KINDS)
            said[kind][answer if kind == "direction" else f"named first: {f'first, {answer} or' in asked}"] += 1
            messages = [{"role": "user", "content": f"<video>{asked}"}, {"role": "assistant", "content": answer}]
            record = {"messages": messages, "kind": kind}
            yield {"__key__": f"{split}-{number:06d}", "mp4": clip, "json": json.dumps(record).encode()}

    shards = write_shards(folder, split, samples(), samples_per_shard=1000, total=count)
    return [str(path) for path in shards], {kind: max(found.values()) / found.total() for kind, found in said.items()}


def texts() -> list[str]:
    """What is asked and said, for the tokenizer."""
    shapes = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    moves = [question(Scene("direction", (one,), "")) for one in shapes]
    orders = [question(Scene("order", (one, other), "")) for one, other in zip(shapes, shapes[5:] + shapes[:5], strict=True)]
    words = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    return [*moves, *orders, *DIRECTIONS, *COLOURS, *words, *words]


def build_model(folder: Path, seed: int) -> Path:
    """Random weights, Qwen2.5-VL's own architecture and processor."""
    torch.manual_seed(seed)
    pixels = {"size": {"shortest_edge": SIZE * SIZE, "longest_edge": FRAMES * SIZE * SIZE}}
    processor, model = qwen("Qwen2_5_VL", VISION, {"mrope_section": [4, 6, 6]}, pixels, "Qwen2VLVideoProcessor", texts=texts(), **TEXT)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    for name, weight in model.named_parameters():  # as large as keeps the size of the input: transformers' own are for wide models
        if weight.ndim > 1:
            is_table = "embed_tokens" in name or "lm_head" in name
            torch.nn.init.normal_(weight, std=0.1 if is_table else weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(name: str, frames: int, folder: Path, shards: dict[str, list[str]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and ask; what the run's summary says."""
    settings = {
        "name": name, "output_dir": str(folder / "runs"), "seed": arguments.seed,
        "model": {"name": str(folder / "base"), "load_in_4bit": False, "dtype": "float32"}, "lora": None,
        "data": {
            "train": shards["train"], "heldout": shards["heldout"], "max_seq_length": 256, "shuffle_window": 1000, "workers": 1,
            "video": {"fps": FRAMES / 4, "min_frames": frames, "max_frames": frames},
        },
        "optim": {"lr": arguments.lr, "betas": [0.9, 0.98], "weight_decay": 0.01, "warmup_steps": 50, "min_lr_ratio": 0.05},
        "training": {"steps": arguments.steps, "global_batch": arguments.batch, "micro_batch": arguments.batch},
        "evaluation": {"every": arguments.every, "samples": arguments.heldout, "batch_size": 100, "max_new_tokens": 12},
        "checkpoint": {"save_every": arguments.steps}, "log": {"every": 50, "wandb": "disabled"},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(settings))
    started = time.monotonic()
    train(load_config(folder / f"{name}.yaml"))
    after = read_json(folder / "runs" / name / "summary.json")["eval"]["after"]
    share = {kind: after["by_kind"][kind] for kind in KINDS}
    return {"frames": frames, "right": share, "samples": after["samples"], "seconds": round(time.monotonic() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("--train", 10_000), ("--heldout", 400), ("--steps", 1000), ("--batch", 32), ("--every", 300), ("--seed", 0)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--folder", type=Path, help="where data and runs stay; default: a temporary one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        made = {split: write_clips(folder / "data", split, getattr(arguments, split), arguments.seed) for split in ("train", "heldout")}
        shards, chance = {split: paths for split, (paths, _) in made.items()}, made["heldout"][1]
        build_model(folder / "base", arguments.seed)
        found = {name: run(name, frames, folder, shards, arguments) for name, frames in (("clip", FRAMES), ("one_frame", 1))}
    print(json.dumps({"chance": chance, **found}, indent=1))
    if arguments.out:
        write_json(
            arguments.out,
            {
                "chance": chance,
                **found,
                "environment": describe_environment(alone()),
            },
        )


if __name__ == "__main__":
    main()
