"""Bytes that a rank sends in an optimizer step at each ZeRO stage, on the wire, against theory.

    python scripts/bench/communication.py --ranks 2 --out docs/benchmarks/communication.json

A LLaVA of 16 million parameters in NF4 with LoRA (r=64), two micro-batches a rank, gloo over the loopback device of a network namespace of
its own (needs root; without, other traffic of the machine is counted too). Theory: a ring all-reduce of n bytes sends 2 (W-1)/W n a rank,
a ring reduce-scatter or all-gather (W-1)/W n (Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STAGES = (0, 1, 2, 3)
STEPS = 6
ALONE = "VLM_DIST_BENCH_ALONE"


def theory(stage: int, ranks: int, base: float, trainable: float, rounds: int) -> dict[str, float]:
    """Bytes a rank sends in a step, by purpose: the collectives that DeepSpeed 0.19 asks for, each as a ring.

    Args:
        base: bytes of the frozen weights.
        trainable: bytes of the others in float32.
        rounds: micro-batches in a step.
    """
    share = (ranks - 1) / ranks
    if stage == 0:
        return {"all-reduce of gradients": 2 * share * trainable}
    if stage < 3:  # stage 2 reduces after each micro-batch; both by all-reduce (use_multi_rank_bucket_allreduce)
        times = rounds if stage == 2 else 1
        return {"all-reduce of gradients": 2 * share * trainable * times, "all-gather of weights": share * trainable}
    gather = share * (base + trainable) * rounds
    return {"all-gather, forward": gather, "all-gather, backward": gather, "reduce-scatter of gradients": share * trainable * rounds}


def sent() -> int:
    """Bytes that left through the loopback device: what all ranks sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    raise RuntimeError("no loopback device")


def measure(stage: int, folder: Path) -> dict[str, Any]:
    """Train a few steps on this rank; the wire's counter is read at the start of each step."""
    import deepspeed.comm

    from vlm_dist import load_config, train
    from vlm_dist.data.stream import Stream
    from vlm_dist.training import session

    marks: list[tuple[int, int]] = []
    held: dict[str, int] = {}
    next_step, start_engine = Stream.next_step, session.start_engine

    def marked(self):
        deepspeed.comm.barrier()  # no rank is still sending
        logged = deepspeed.comm.comm.comms_logger.get_raw_data()
        marks.append((sent(), sum(size * entry[0] for sizes in logged.values() for size, entry in sizes.items())))
        return next_step(self)

    def started(model, *rest):
        for parameter in model.parameters():
            kind = "trainable" if parameter.requires_grad else "base"
            held[kind] = held.get(kind, 0) + (parameter.numel() * 4 if parameter.requires_grad else parameter.nbytes)
        return start_engine(model, *rest)

    Stream.next_step, session.start_engine = marked, started
    # so that every weight is gathered for each use, as in a model whose layers are large
    small = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    options = {"comms_logger": {"enabled": True, "prof_all": True}, **({"zero_optimization": small} if stage == 3 else {})}
    try:
        train(
            load_config(
                folder / "config.yaml", [f"name=stage-{stage}", f"engine.zero_stage={stage}", f"engine.deepspeed={json.dumps(options)}"]
            )
        )
    finally:
        Stream.next_step, session.start_engine = next_step, start_engine
    wire, logged = ([b - a for a, b in itertools.pairwise(column)][1:] for column in zip(*marks, strict=True))
    return {**held, "wire_bytes_all_ranks": statistics.median(wire), "logged_message_bytes": statistics.median(logged)}


def prepare(folder: Path, ranks: int) -> None:
    """Data, base model and configuration."""
    from vlm_dist.config import ScratchConfig
    from vlm_dist.data.synthetic import synthesise
    from vlm_dist.models.scratch import build_checkpoint

    shards = synthesise(
        folder / "data", train=40, heldout=1, tasks=("qa",), seed=0, size=64, image_format="jpg", shard_size=40, questions_per_picture=2
    )
    sizes = ScratchConfig(vision_width=256, language_width=512, vision_layers=4, language_layers=4)
    build_checkpoint(sizes, ["how many shapes are there?"] * 50, 0, folder / "base")
    config = {
        "name": "bench", "output_dir": str(folder / "runs"), "model": {"name": str(folder / "base"), "dtype": "float32"}, "lora": {"r": 64},
        "data": {"train": [str(path) for path in shards["qa-train"]], "max_seq_length": 256},
        "training": {"steps": STEPS, "global_batch": 2 * ranks, "micro_batch": 1},
        "checkpoint": {"save_every": 0}, "log": {"wandb": "disabled", "every": 100},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))


def run_ranks(folder: Path) -> None:
    """One rank of all stages, under torchrun."""
    found = {stage: measure(stage, folder) for stage in STAGES}
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        run_ranks(arguments.folder)
        return 0
    if os.geteuid() == 0 and ALONE not in os.environ:
        os.environ[ALONE] = "1"
        inside = f'ip link set lo up 2>/dev/null || ifconfig lo up; exec {sys.executable} "$@"'
        os.execvp("unshare", ["unshare", "--net", "bash", "-c", inside, "bash", *sys.argv])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, arguments.ranks)
        command = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", str(arguments.ranks), "--standalone", __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run([*command, "--folder", temporary], check=True, env=environment)
        found = json.loads((folder / "found.json").read_text())
    report(found, arguments)
    return 0


def report(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    from vlm_dist import distributed
    from vlm_dist.environment import describe_environment
    from vlm_dist.run_dir import write_json

    rows = []
    for stage, numbers in found.items():
        parts = theory(int(stage), arguments.ranks, numbers["base"], numbers["trainable"], rounds=2)
        gloo = sum(parts.values()) + parts.get("reduce-scatter of gradients", 0)  # gloo does a reduce-scatter by an all-reduce
        measured = numbers["wire_bytes_all_ranks"] / arguments.ranks
        ratios = {"ratio": round(measured / sum(parts.values()), 3), "ratio_gloo": round(measured / gloo, 3)}
        rows.append({"stage": int(stage), **numbers, "sent_by_a_rank": measured, "theory": parts, "theory_gloo": gloo, **ratios})
        print(
            f"stage {stage}: a rank sent {measured / 1e6:.2f} MB a step; theory {sum(parts.values()) / 1e6:.2f} MB ({ratios['ratio']}), "
            f"with gloo's collectives {gloo / 1e6:.2f} MB ({ratios['ratio_gloo']})"
        )
    if arguments.out:
        environment = describe_environment(distributed.start())
        write_json(arguments.out, {"command": " ".join(sys.argv), "ranks": arguments.ranks, "stages": rows, "environment": environment})


if __name__ == "__main__":
    sys.exit(main())
