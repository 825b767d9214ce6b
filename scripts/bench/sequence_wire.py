"""Bytes that ranks which share a row really send each other for a micro-batch, on the wire, against theory.

    python scripts/bench/sequence_wire.py --out docs/benchmarks/sequence_wire.json

The models and rows of sequence_parallel.py, each of N ranks a process of its own; gloo over the loopback device of a network namespace of
its own (needs root; without, other traffic of the machine is counted too). Forward and backward passes, without the sum of gradients. What
is more than theory is TCP's and gloo's own: headers and acknowledgements.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.remove(str(Path(__file__).resolve().parent))  # there kernels.py would hide Hugging Face's package `kernels`
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench.communication import ALONE, sent
from scripts.bench.saved_activations import build
from scripts.bench.sequence_parallel import cut_batch, sent_in_theory

TIMES = 5


def measure(paths: list[str]) -> list[dict[str, Any]]:
    """On this rank: of each model the tokens of its row and the bytes that all ranks sent for a micro-batch."""
    import torch

    from vlm_dist import distributed
    from vlm_dist.config import LoraConfig, ModelConfig
    from vlm_dist.models.load import load_model
    from vlm_dist.models.lora import add_lora
    from vlm_dist.models.loss import summed_loss
    from vlm_dist.models.patching import patch_model
    from vlm_dist.models.sequence import SequenceCut, cut_rows

    ranks, found, lora = distributed.start(), [], LoraConfig(r=8, vision=False)
    barrier = torch.distributed.barrier
    for path in paths:
        model, processor, family = load_model(ModelConfig(name=path, load_in_4bit=False), path, torch.device("cpu"), lora=lora)
        model = add_lora(model, family, lora).train()
        cut = SequenceCut(ranks.world_size, ranks.rank, torch.distributed.group.WORLD)
        cut_rows(model, cut)
        patch_model(model, "auto")
        batch = cut_batch(processor)

        def wire(times: int, model: Any = model, cut: SequenceCut = cut, batch: dict[str, Any] = batch) -> int:
            """Bytes between two moments at which no rank sends."""
            barrier()
            before = sent()
            barrier()
            for _ in range(times):
                with cut.cutting():
                    summed_loss(model, batch).backward()
            barrier()
            after = sent()
            barrier()
            return after - before

        wire(1)  # connections are made
        found.append({"tokens": batch["input_ids"].shape[1], "wire_bytes_all_ranks": (wire(TIMES) - wire(0)) / TIMES})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["llava", "qwen2_5_vl", "qwen3_vl"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        out, *paths = arguments.inside
        found = measure(paths)
        if os.environ["RANK"] == "0":
            Path(out).write_text(json.dumps(found))
        return 0
    if os.geteuid() == 0 and ALONE not in os.environ:
        os.environ[ALONE] = "1"
        inside = f'ip link set lo up 2>/dev/null || ifconfig lo up; exec {sys.executable} "$@"'
        os.execvp("unshare", ["unshare", "--net", "bash", "-c", inside, "bash", *sys.argv])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [build(family, Path(folder)) for family in arguments.families]
        for number in arguments.ranks:
            command = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", str(number), "--standalone", __file__]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            subprocess.run([*command, "--inside", f"{folder}/found.json", *paths], check=True, env=environment)
            found = json.loads(Path(folder, "found.json").read_text())
            for family, path, one in zip(arguments.families, paths, found, strict=True):
                theory = sent_in_theory(path, number, one["tokens"])
                row = {"family": family, "ranks": number, **one, "sent_by_a_rank": one["wire_bytes_all_ranks"] / number}
                rows.append(row | {"sent_in_theory": theory, "ratio": round(row["sent_by_a_rank"] / theory, 4)})
                print(
                    f"{family:12} N={number}: a rank sent {row['sent_by_a_rank'] / 2**20:.3f} MiB, theory {theory / 2**20:.3f}", flush=True
                )
    if arguments.out:
        from vlm_dist import distributed
        from vlm_dist.environment import describe_environment
        from vlm_dist.run_dir import write_json

        write_json(arguments.out, {"environment": describe_environment(distributed.start()), "results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
