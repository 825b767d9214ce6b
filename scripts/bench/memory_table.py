"""Which card trains what: published models at full size, planned for several cards. Counted, not run: docs/memory.md says how.

    python scripts/bench/memory_table.py --out docs/benchmarks/memory_table.json

Rows of 2,048 tokens, of which one picture of 896 x 896 takes what the model's processor gives it; QLoRA r=16 on vision tower and language
model, 8-bit AdamW, global batch 16 on one card.
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
from vlm_dist.planning.plan import MODES, make_plan, open_planner
from vlm_dist.quiet import quiet_libraries
from vlm_dist.run_dir import write_json
from vlm_dist.testing.full_size import SIZES, full_size_config


def plan_model(name: str, gpus: list[str], folder: Path) -> dict[str, Any]:
    """A row: what one row of tokens takes by what is recomputed, and the quickest fitting choice on each card."""
    path = full_size_config(name, folder / name)
    text = {
        "name": name, "model": {"name": str(path)}, "data": {"train": "none"}, "optim": {"name": "adamw_8bit"},
        "training": {"steps": 1, "global_batch": 16},
    }  # fmt: skip
    config = parse_config(json.dumps(text))
    with open_planner(config, GPUS[gpus[0]], 1, size=(896, 896), note=lambda text: print(name, text, file=sys.stderr)) as planner:
        plans = {}
        for gpu in gpus:
            planner.gpu = GPUS[gpu]
            plans[gpu] = {key: value for key, value in make_plan(planner).items() if key != "model"}  # a folder of this machine
        one = {}
        for mode, wanted in MODES.items():
            changed = config.model_copy(update={"model": planner.config.model.model_copy(update={"gradient_checkpointing": wanted})})
            one[mode] = planner.describe(changed, 1, planner.count(changed, 1))
    return {"name": name, "one_row": one, "plans": plans}


def as_table(rows: list[dict[str, Any]], gpus: list[str]) -> str:
    lines = [f"| model | weights | one row, nothing recomputed | all recomputed | {' | '.join(gpus)} |", "|---" * (4 + len(gpus)) + "|"]
    for row in rows:
        parts = row["one_row"]["none"]["memory"]
        weights = sum(parts.get(name, 0) for name in ("base in 4 bit", "its scales", "base in 16 bit", "trainable weights"))
        cells = [row["name"], _gb(weights), _gb(row["one_row"]["none"]["total"]), _gb(row["one_row"]["all"]["total"])]
        for gpu in gpus:
            fitting = [choice for choice in row["plans"][gpu]["choices"] if choice["fits"]]
            best = min(fitting, key=lambda choice: choice["step_s"]["fast"], default=None)
            if best is None:
                cells.append("no")
            else:
                cells.append(f"{best['micro_batch']} rows, {_recomputed(best['gradient_checkpointing'])}, {_gb(best['total'])}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _recomputed(mode: str) -> str:
    return {"none": "nothing recomputed", "all": "all recomputed"}.get(mode, f"{mode} recomputed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--gpus", nargs="+", default=["rtx4090", "l40s", "h100"], choices=list(GPUS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        rows = [plan_model(name, arguments.gpus, Path(folder)) for name in arguments.models]
    print(as_table(rows, arguments.gpus))
    if arguments.out:
        write_json(arguments.out, {"command": "python " + " ".join(sys.argv), "rows": rows})


if __name__ == "__main__":
    main()
