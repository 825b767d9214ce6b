"""Several runs, one after another, in the same processes: one start of a launcher serves many tests.

    torchrun --nproc-per-node 2 tests/launch/many.py RUNS.json

RUNS.json: [{"config": path, "overrides": [...], "fault": null}, ...]. A fault befalls rank 1 alone: "nan" (the loss of its third forward
pass), "slow" (each forward pass takes 0.1 s more), a number (SIGTERM after the forward passes of so many steps).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path

from vlm_dist import load_config, train
from vlm_dist.training import train as loop

summed_loss = loop.summed_loss


def faulty(fault: str | int):
    calls = 0

    def forward(*arguments):
        nonlocal calls
        calls += 1
        if fault == "slow":
            time.sleep(0.1)
        if fault == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return summed_loss(*arguments) * (float("nan") if fault == "nan" and calls == 3 else 1.0)

    return forward


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--local_rank", help="given by the deepspeed launcher")
    for run in json.loads(parser.parse_args().runs.read_text()):
        fault = run.get("fault") if os.environ["RANK"] == "1" else None
        loop.summed_loss = faulty(fault) if fault else summed_loss
        train(load_config(run["config"], run["overrides"]))


if __name__ == "__main__":
    main()
