"""data.cache_features on the mini VLM: samples/s of the first epoch, of later ones, and of a second run, beside a run without it.

    python scripts/bench/features.py --out docs/benchmarks/features.json

A frozen ViT of ViT-Base's width, and a language model and projector that train, both with random weights; synthetic pictures of 224 pixels,
in float32, on whatever there is. The share of the tower in the step's FLOPs, as `vlm-dist plan` counts it, stands beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from vlm_dist import distributed, load_config, train
from vlm_dist.data.synthetic import synthesise
from vlm_dist.environment import describe_environment
from vlm_dist.run_dir import write_json


def parts(folder: Path) -> dict[str, str]:
    """A vision encoder and a language model to join, as folders."""
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTImageProcessor, ViTModel

    from vlm_dist.testing.parts import small_tokenizer

    vision, language = folder / "vision", folder / "language"
    ViTModel(ViTConfig(num_hidden_layers=6)).save_pretrained(vision)
    ViTImageProcessor().save_pretrained(vision)
    tokenizer, _ = small_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(language)
    tokenizer.save_pretrained(language)
    return {"vision": str(vision), "language": str(language)}


def speed(folder: Path, name: str, shards: list[str], model: dict[str, str], *, epochs: int, keep: bool) -> list[float]:
    """Samples a second of each step but the first."""
    config = {
        "name": name, "output_dir": str(folder / "runs"), "lora": None, "data": {"train": shards, "cache_features": keep,
        "cache_dir": str(folder / "cache")}, "model": {"mini_vlm": model, "load_in_4bit": False, "freeze": ["vision"], "dtype": "float32"},
        "training": {"epochs": epochs, "global_batch": 8, "micro_batch": 8}, "log": {"wandb": "disabled"},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))
    train(load_config(path))
    rows = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return [row["samples_per_s"] for row in rows if "samples_per_s" in row]


def share_of_tower(folder: Path, name: str) -> float:
    """Of the FLOPs of a micro-batch."""
    from vlm_dist.planning.gpus import find_gpu
    from vlm_dist.planning.plan import make_plan, open_planner

    config = load_config(folder / f"{name}.yaml", [f"model.name={folder / 'runs' / name / 'initial_model'}", "model.mini_vlm=null"])
    with open_planner(config, find_gpu("h100"), 1) as planner:
        flops = make_plan(planner, others=False)["own"]["flops"]
    return flops["vision"] / (flops["forward"] + flops["backward"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        files = synthesise(folder / "shards", train=arguments.pictures, heldout=0, tasks=("caption",), size=224, seed=0)
        shards, model = [str(path) for path in files["caption-train"]], parts(folder)
        steps = arguments.pictures // 8
        first, again, plain = (
            speed(folder, name, shards, model, epochs=arguments.epochs, keep=keep)
            for name, keep in (("first", True), ("again", True), ("plain", False))
        )
        result: dict[str, Any] = {
            "command": f"scripts/bench/features.py --pictures {arguments.pictures} --epochs {arguments.epochs}",
            "samples_per_s": {
                "first_epoch": statistics.median(first[1:steps]), "last_epoch": statistics.median(first[-steps:]),
                "second_run": statistics.median(again[1:]), "without": statistics.median(plain[1:]),
            },
            "share_of_tower_in_flops": share_of_tower(folder, "plain"),
            "kept_mb_a_picture": sum(file.stat().st_size for file in (folder / "cache").rglob("*.safetensors")) / arguments.pictures / 1e6,
            "environment": describe_environment(distributed.alone()),
        }  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
