"""What the training loop costs beside the bare arithmetic: `vlm_dist.train` against a plain torch loop, on the same model, the same
batches and the same optimizer, in turn, in one process.

    python scripts/bench/loop_overhead.py --steps 40 --rounds 5 --out docs/benchmarks/loop_overhead.json

Needs data/quickstart and runs/quickstart-base (scripts/quickstart.sh makes both). The batches are encoded beforehand for both.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

from vlm_dist import distributed
from vlm_dist.config import Config
from vlm_dist.config_load import load_config
from vlm_dist.data.encode import IGNORED
from vlm_dist.data.stream import Step, Stream
from vlm_dist.environment import describe_environment
from vlm_dist.inputs.opened import open_inputs
from vlm_dist.quiet import quiet_libraries
from vlm_dist.run_dir import RunDir, read_jsonl, write_json
from vlm_dist.training.prepare import load_trainable


def prepared_steps(config: Config, run: RunDir, ranks, count: int) -> list[Step]:
    return list(itertools.islice(open_inputs(config, run, ranks).stream().steps(), count))


def bare_loop(config: Config, run: RunDir, steps: list[Step], ranks) -> float:
    """Median seconds a step of forward, backward, clipping and AdamW, and nothing else."""
    import torch

    model = load_trainable(open_inputs(config, run, ranks), ranks).model.to(ranks.device).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.optim.lr, weight_decay=config.optim.weight_decay)
    seconds = []
    for step in steps:
        start = time.perf_counter()
        for batch in step.micro_batches:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            positions = (batch["labels"][:, 1:] != IGNORED).any(0).nonzero().squeeze(1)
            logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
            targets = batch["labels"][:, 1:][:, positions]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
            (loss / step.counts.labels).backward()
        torch.nn.utils.clip_grad_norm_(trainable, config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def our_loop(config: Config, run: RunDir, steps: list[Step]) -> float:
    """Median seconds a step of `vlm_dist.train`, logging and all, with the same batches put in place of the stream's."""
    import logging

    from vlm_dist.training.train import train

    ready = iter(steps)
    original, Stream.next_step = Stream.next_step, lambda self: next(ready)
    logging.getLogger("vlm_dist").propagate = False
    try:
        train(config)
    finally:
        Stream.next_step = original
    rows = [row for row in read_jsonl(run.metrics) if "loss" in row]
    return statistics.median(row["step_s"] for row in rows[3:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/loop_overhead.json"))
    arguments = parser.parse_args()
    quiet_libraries()
    ranks = distributed.start()
    rounds = []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            overrides = [f"output_dir={folder}", f"name=round-{number}", f"training.steps={arguments.steps}", "data.heldout=[]"]
            config = load_config(arguments.config, [*overrides, "checkpoint.save_every=0", "log.every=1000000", "log.wandb=disabled"])
            run = RunDir(Path(config.output_dir) / config.name)
            run.log(0).parent.mkdir(parents=True)
            steps = prepared_steps(config, run, ranks, arguments.steps)
            bare, ours = bare_loop(config, run, steps, ranks), our_loop(config, run, steps)
        rounds.append({"bare_s": bare, "ours_s": ours, "ratio": ours / bare})
        print(f"round {number}: bare {1e3 * bare:.1f} ms, ours {1e3 * ours:.1f} ms, ratio {ours / bare:.3f}", flush=True)
    result = {
        "what": "median seconds per optimizer step, ours / bare torch loop",
        "config": arguments.config,
        "steps": arguments.steps,
        "rounds": rounds,
        "ratio_median": statistics.median(row["ratio"] for row in rounds),
        "environment": describe_environment(ranks),
    }
    write_json(arguments.out, result)
    print(f"median ratio {result['ratio_median']:.3f}; {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
