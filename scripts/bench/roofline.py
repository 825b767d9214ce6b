"""Launches, moved and kept bytes, waits and time of a micro-batch of Qwen2.5-VL-7B, counted with our kernels and without, on two cards.

    python scripts/bench/roofline.py --out docs/benchmarks/roofline.json

NF4, LoRA r=16 on vision and language, one row of 2,048 tokens with one picture of 896 x 896, nothing recomputed, everything but the
picture supervised; each operation at the roofline of its own FLOPs and bytes, and at least 5 microseconds to launch.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from vlm_dist.config_load import parse_config
from vlm_dist.planning.gpus import GPUS
from vlm_dist.planning.plan import open_planner
from vlm_dist.planning.profile import profile
from vlm_dist.quiet import quiet_libraries
from vlm_dist.run_dir import write_json
from vlm_dist.testing.full_size import SIZES, full_size_config


def profiles(name: str, gpus: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """By card and kernels."""
    path = full_size_config(name, folder / name)
    text = {
        "name": name, "model": {"name": str(path), "gradient_checkpointing": False}, "data": {"train": "none"},
        "training": {"steps": 1, "micro_batch": 1, "global_batch": 1},
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for gpu in gpus:
        with open_planner(parse_config(json.dumps(text)), GPUS[gpu], 1, size=(896, 896), note=_tell) as planner:
            found[gpu] = {kernels: profile(planner, planner.config.model_copy(update={"kernels": kernels})) for kernels in ("auto", "off")}
    return found


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def as_table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| card | kernels | launches | GB moved | ms | limit | share | kept a token and layer | a patch and block | waits |",
        "|---" * 10 + "|",
    ]
    for gpu, both in found.items():
        for kernels, one in both.items():
            kept = one["kept_bytes"]
            lines.append(
                f"| {gpu} | {kernels} | {one['launches']:,} | {one['moved_bytes'] / 1e9:.0f} | {one['roofline_ms']:.0f} | "
                f"{one['limit_ms']:.0f} | {one['share']:.2f} | {kept['language_token_layer'] / 1e3:.1f} kB | "
                f"{kept['vision_patch_block'] / 1e3:.1f} kB | {one['device_waits']} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-vl-7b", choices=list(SIZES))
    parser.add_argument("--gpus", nargs="+", default=["h100", "rtx4090"], choices=list(GPUS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        found = profiles(arguments.model, arguments.gpus, Path(folder))
    print(as_table(found))
    if arguments.out:
        write_json(arguments.out, {"command": "python " + " ".join(sys.argv), "model": arguments.model, "cards": found})


if __name__ == "__main__":
    main()
