"""Several runs, one after another, in the same processes: one start of a launcher serves many tests.

    torchrun --nproc-per-node 2 tests/launch/many.py RUNS.json

RUNS.json: [{"config": path, "overrides": [...], "fault": null}, ...]. A fault befalls rank 1 alone: "nan" (the loss of its third forward
pass), "slow" (each forward pass takes 0.1 s more), a number (SIGTERM after the forward passes of so many steps). "halves" is of all
ranks: each uses its half of the experts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable
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


def halve_experts(half: Callable[[], int]) -> Callable[[], None]:
    """Every router chooses among the first or the second half of the experts; gives what takes it back."""
    import torch
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter as Router

    own = Router.forward

    def forward(self, hidden_states):
        logits = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        others = torch.arange(self.num_experts) // (self.num_experts // 2) != half()
        top = torch.softmax(logits.masked_fill(others, -1e9), -1).topk(self.top_k, -1)
        return logits, top.values / top.values.sum(-1, keepdim=True), top.indices

    Router.forward = forward
    return lambda: setattr(Router, "forward", own)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--local_rank", help="given by the deepspeed launcher")
    for run in json.loads(parser.parse_args().runs.read_text()):
        fault = run.get("fault") if os.environ["RANK"] == "1" else None
        loop.summed_loss = faulty(fault) if fault and fault != "halves" else summed_loss
        if run.get("fault") == "halves":
            halve_experts(lambda: int(os.environ["RANK"]))
        train(load_config(run["config"], run["overrides"]))


if __name__ == "__main__":
    main()
