"""The longest row of QLoRA that a card holds, alone and shared by N (engine.sequence_parallel). Counted, not run: docs/memory.md says how.

    python scripts/bench/longest_rows.py --out docs/benchmarks/longest_rows.json

One row a micro-batch with one picture of 896 x 896, all recomputed, r=16 on vision tower and language model, 8-bit AdamW. Two lengths are
counted for each N, and the length at which the card is full follows from the line through them; whether the model was taught such
positions is another matter.
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
from vlm_dist.quiet import quiet_libraries
from vlm_dist.run_dir import write_json
from vlm_dist.testing.full_size import SIZES, full_size_config

TOKENS = 24_576  # in shorter ones, shared by many, the picture is what takes most


def longest(name: str, number: int, gpus: list[str], folder: Path) -> dict[str, Any]:
    """Tokens of the longest row by card, and the bytes of the two that were counted."""
    path = full_size_config(name, folder / name)
    text = {
        "name": name, "model": {"name": str(path), "gradient_checkpointing": True}, "data": {"train": "none", "max_seq_length": TOKENS},
        "optim": {"name": "adamw_8bit"}, "engine": {"sequence_parallel": number},
        "training": {"steps": 1, "global_batch": 1, "micro_batch": 1},
    }  # fmt: skip
    note = lambda text: print(name, number, text, file=sys.stderr)  # noqa: E731
    with open_planner(parse_config(json.dumps(text)), GPUS[gpus[0]], number, size=(896, 896), note=note) as planner:
        rows = {}
        for gpu in gpus:
            planner.gpu = GPUS[gpu]
            rows[gpu] = planner.longest_row(planner.config)
        counted = {tokens: planner.total(planner.config, planner.count(planner.config, 1, tokens)) for tokens in (TOKENS, 2 * TOKENS)}
    return {"name": name, "ranks": number, "longest_row": rows, "bytes_by_tokens": counted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen2.5-vl-7b"], choices=list(SIZES))
    parser.add_argument("--gpus", nargs="+", default=["rtx4090", "h100"], choices=list(GPUS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        rows = [longest(name, number, arguments.gpus, Path(folder)) for name in arguments.models for number in arguments.ranks]
    print(f"| model | N | {' | '.join(arguments.gpus)} |\n|---|---{'|---' * len(arguments.gpus)}|")
    for row in rows:
        cells = " | ".join(f"{row['longest_row'][gpu]:,}" for gpu in arguments.gpus)
        print(f"| {row['name']} | {row['ranks']} | {cells} |")
    if arguments.out:
        write_json(arguments.out, {"command": "python " + " ".join(sys.argv), "rows": rows})


if __name__ == "__main__":
    main()
