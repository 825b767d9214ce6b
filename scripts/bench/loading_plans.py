"""What a card holds while Qwen2.5-VL-32B and 72B are loaded and in a step, by the way they are trained. Counted, not run.

    python scripts/bench/loading_plans.py --out docs/benchmarks/loading_plans.json

Rows of 2,048 tokens with one picture of 896 x 896, one a card; all layers recomputed; adapters of rank 16 or full training, AdamW.
"Whole" is what each card would hold at the most if every rank loaded the model whole before it is sharded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from vlm_dist.config_load import parse_config
from vlm_dist.planning.gpus import GPUS
from vlm_dist.planning.memory import CONTEXT
from vlm_dist.planning.plan import make_plan, open_planner
from vlm_dist.quiet import quiet_libraries
from vlm_dist.run_dir import write_json
from vlm_dist.testing.full_size import full_size_config


class Case(NamedTuple):
    model: str
    full: bool
    stage: int
    gpu: str
    gpus: int


CASES = (
    Case("qwen2.5-vl-32b", full=False, stage=0, gpu="h100", gpus=1),
    Case("qwen2.5-vl-32b", full=False, stage=3, gpu="rtx4090", gpus=4),
    Case("qwen2.5-vl-32b", full=True, stage=3, gpu="h100", gpus=16),
    Case("qwen2.5-vl-72b", full=False, stage=0, gpu="h100", gpus=1),
    Case("qwen2.5-vl-72b", full=False, stage=3, gpu="rtx4090", gpus=8),
    Case("qwen2.5-vl-72b", full=True, stage=3, gpu="h100", gpus=32),
)


def plan_case(case: Case, folder: Path) -> dict[str, Any]:
    """Bytes on a card: while loading, in a step, and what all weights whole would be."""
    path = full_size_config(case.model, folder / case.model)
    text: dict[str, Any] = {
        "name": "x", "model": {"name": str(path), "gradient_checkpointing": True}, "data": {"train": "none"},
        "training": {"steps": 1, "micro_batch": 1, "global_batch": case.gpus}, "engine": {"zero_stage": case.stage},
    }  # fmt: skip
    if case.full:
        text["model"]["load_in_4bit"], text["lora"] = False, None
    config = parse_config(json.dumps(text))
    with open_planner(config, GPUS[case.gpu], case.gpus, size=(896, 896), note=lambda text: print(case, text, file=sys.stderr)) as planner:
        own = make_plan(planner, others=False)["own"]
        counted = planner.count(planner.config, 1)
    whole = sum(counted.weights.values()) + counted.largest_loaded + CONTEXT
    return {**case._asdict(), "loading": own["loading"], "whole": whole, "step": own["total"], "fits": own["fits"]}


def as_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | trained | cards | ZeRO | while loading | loaded whole | a step | fits |", "|---" * 8 + "|"]
    for row in rows:
        trained = "all of it, 16 bit" if row["full"] else "adapters on 4 bit"
        sizes = [f"{row[key] / 1e9:.1f} GB" for key in ("loading", "whole", "step")]
        cards = f"{row['gpus']} x {GPUS[row['gpu']].name}"
        lines.append("| " + " | ".join([row["model"], trained, cards, str(row["stage"]), *sizes, "yes" if row["fits"] else "no"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        rows = [plan_case(case, Path(folder) / str(number)) for number, case in enumerate(CASES)]
    print(as_table(rows))
    if arguments.out:
        write_json(arguments.out, {"command": "python " + " ".join(sys.argv), "rows": rows})


if __name__ == "__main__":
    main()
