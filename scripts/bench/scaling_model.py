"""Step time of data-parallel QLoRA on many GPUs, on paper: computing, sending, waiting. Not a measurement; every assumption is an option.

    python scripts/bench/scaling_model.py                        # Qwen2.5-VL-7B, r=16, H100 nodes of 8 with 400 Gb/s for each GPU
    python scripts/bench/scaling_model.py --gpus 8 64 --efficiency 0.3 --node-gbps 100

Sending: a ring over W ranks (docs/scaling.md; scripts/bench/communication.py measures these bytes for W = 2 and 4). The slowest link
decides: inside a node --gpu-gbps, between nodes --node-gbps for each GPU. Nothing is overlapped with computing: a bound from above for
sending. Waiting: the slowest of W ranks, whose work varies by --imbalance (standard deviation over mean), is expected at
1 + imbalance x sqrt(2 ln W) of the mean (extreme of normal variables; Cramer 1946).
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass

from communication import theory


@dataclass(frozen=True)
class Estimate:
    """Seconds of one optimizer step."""

    gpus: int
    stage: int
    compute_s: float
    send_s: float
    wait_s: float

    @property
    def step_s(self) -> float:
        return self.compute_s + self.send_s + self.wait_s

    @property
    def efficiency(self) -> float:
        """Share of the step in which the mean rank computes."""
        return self.compute_s / self.step_s


def estimate(arguments: argparse.Namespace, gpus: int, stage: int) -> Estimate:
    """One row of the table."""
    tokens = arguments.tokens * arguments.rounds
    compute_s = tokens * arguments.flops_per_token / (arguments.tflops * 1e12 * arguments.efficiency)
    gbps = arguments.gpu_gbps if gpus <= arguments.gpus_per_node else min(arguments.gpu_gbps, arguments.node_gbps)
    base = arguments.base_gb * 1e9
    sent = sum(theory(stage, gpus, base, arguments.trainable * 4, arguments.rounds).values())
    collectives = arguments.rounds * arguments.layers * 2 if stage == 3 else 2
    send_s = sent * 8 / (gbps * 1e9 * arguments.link_efficiency) + collectives * 2 * math.log2(max(2, gpus)) * arguments.latency_us * 1e-6
    return Estimate(gpus, stage, compute_s, send_s, compute_s * arguments.imbalance * math.sqrt(2 * math.log(max(1, gpus))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 1024])
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a micro-batch (default: 2048, of which 1024 image tokens)")
    parser.add_argument("--rounds", type=int, default=4, help="micro-batches of a rank in a step (default: 4)")
    parser.add_argument(
        "--flops-per-token", type=float, default=26.4e9, help="forward and backward (default: 26.9 + 27.1 TFLOP for 2,048 tokens)"
    )
    parser.add_argument("--tflops", type=float, default=790, help="of the GPU, dense bfloat16, attainable (default: 790)")
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of it that a step reaches (default: 0.4)")
    parser.add_argument(
        "--base-gb", type=float, default=6.9, help="frozen weights (default: 6.9, Qwen2.5-VL-7B with language layers in NF4)"
    )
    parser.add_argument("--trainable", type=float, default=51.8e6, help="trainable parameters (default: r=16 on all linear layers)")
    parser.add_argument("--layers", type=int, default=60, help="layers, vision and language (default: 60)")
    parser.add_argument("--gpu-gbps", type=float, default=3600, help="Gb/s between GPUs of a node, one way (default: 3600, NVLink 4)")
    parser.add_argument("--node-gbps", type=float, default=400, help="Gb/s of each GPU's network card (default: 400)")
    parser.add_argument("--link-efficiency", type=float, default=0.7, help="share of a link that a ring reaches (default: 0.7)")
    parser.add_argument("--latency-us", type=float, default=10, help="microseconds of a hop (default: 10)")
    parser.add_argument("--imbalance", type=float, default=0.03, help="standard deviation of ranks' work over its mean (default: 0.03)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [estimate(arguments, gpus, stage) for gpus in arguments.gpus for stage in (0, 2, 3)]
    if arguments.json:
        print(json.dumps([{**vars(row), "step_s": row.step_s, "efficiency": row.efficiency} for row in rows], indent=1))
        return
    print("| GPUs | ZeRO stage | computing s | sending s | waiting s | step s | efficiency |\n|---|---|---|---|---|---|---|")
    for row in rows:
        times = " | ".join(f"{value:.3f}" for value in (row.compute_s, row.send_s, row.wait_s, row.step_s))
        print(f"| {row.gpus:,} | {row.stage} | {times} | {row.efficiency:.0%} |")


if __name__ == "__main__":
    main()
