"""Two cards or more: torchrun at ZeRO 0 to 3 with an uneven number of held-out samples gives the losses of one card; a rank that is
stopped ends the run; one card continues it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from part import ROOT, Part, last_line, run
from tiny import cut, losses_of, make_inputs, settings

WITHIN = 0.02


def write(folder: Path, name: str, stage: int, **sections: Any) -> Path:
    tree = {**settings(folder, ("llava", stage, True, ""), name), **sections}
    tree["evaluation"] = {"samples": 5, "max_new_tokens": 2}
    tree["training"] = {"steps": 4, "global_batch": 4, "micro_batch": 1, **sections.get("training", {})}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(tree))
    return path


def torchrun(ranks: int, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "launch/train.py", *arguments]


def alone(path: Path) -> Any:
    return run(sys.executable, "-m", "vlm_dist.cli.main", "train", str(path), CUDA_VISIBLE_DEVICES="0")


def stopped(part: Part, folder: Path, ranks: int) -> None:
    """SIGSTOP to the last rank."""
    path = write(folder, "stopped", 0, health={"timeout_s": 10}, training={"steps": 5000})
    process = subprocess.Popen(torchrun(ranks, "--config", str(path)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logs = folder / "runs" / "stopped"
    until = time.monotonic() + 90
    while time.monotonic() < until and not (logs / "metrics.jsonl").exists():
        time.sleep(0.5)
    time.sleep(2)
    os.kill(json.loads((logs / "logs" / f"rank-{ranks - 1}.alive.json").read_text())["pid"], signal.SIGSTOP)
    code = process.wait(timeout=60)
    reason = json.loads((logs / "summary.json").read_text())["reason"]
    part.judge(code != 0 and f"rank {ranks - 1}" in reason, "a stopped rank ends the run", reason)


def main() -> None:
    part = Part(__doc__)
    import torch

    ranks = 2 if part.dry else torch.cuda.device_count()
    if ranks < 2:
        part.find("skipped", "several cards", "there is one")
        return part.write()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder, ("llava",))
        first = alone(write(folder, "one", 0))
        part.judge(first.returncode == 0, "one card", last_line(first))
        expected = losses_of(folder / "runs" / "one")
        for stage in (3,) if part.dry else (0, 1, 2, 3):
            name = f"stage-{stage}"
            result = run(*torchrun(ranks, "--config", str(write(folder, name, stage))), timeout=400 if part.dry else 120)
            losses = losses_of(folder / "runs" / name) if result.returncode == 0 else []
            apart = max((abs(a / b - 1) for a, b in zip(losses, expected, strict=False)), default=1.0)
            part.judge(bool(losses) and apart < WITHIN, f"{ranks} cards, ZeRO {stage}",
                       f"losses within {apart:.2%} of one card's" if losses else last_line(result))  # fmt: skip
        if not part.dry:
            part.attempt("a stopped rank", lambda: stopped(part, folder, ranks))
            cut(folder, "stage-0")
            again = alone(write(folder, "cut", 0))
            losses = losses_of(folder / "runs" / "cut")
            good = again.returncode == 0 and abs(losses[-1] / expected[-1] - 1) < WITHIN
            part.judge(good, "continued on one card", last_line(again))
    return part.write()


if __name__ == "__main__":
    main()
