"""Adapters on experts, one layer, forward and backward on this CPU: ours beside PEFT's ParamWrapper, each in a process of its own.

    python scripts/bench/experts.py --out docs/benchmarks/experts.json

Experts and adapters in float32 (products in bfloat16 of this CPU would hide the rest). Memory: the most that the process held during the
steps beyond what it held before (VmHWM, set back before them).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vlm_dist.run_dir import write_json

SIZES = {"experts": 64, "top_k": 4, "hidden": 256, "intermediate": 256, "tokens": 256, "rank": 4}
STEPS = 3
KINDS = ("ours", "ours, NF4", "peft, grouped_mm")


def layer(kind: str) -> Any:
    """A layer's experts of Qwen3-VL, with adapters on both weights."""
    import peft
    from transformers import Qwen3VLMoeConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    from vlm_dist.models.experts import OURS, register
    from vlm_dist.models.experts_lora import prepare_experts
    from vlm_dist.models.experts_nf4 import quantise_experts

    text = Qwen3VLMoeConfig(
        text_config={
            "num_experts": SIZES["experts"], "hidden_size": SIZES["hidden"], "moe_intermediate_size": SIZES["intermediate"],
            "num_experts_per_tok": SIZES["top_k"],
        }
    ).text_config  # fmt: skip
    register()
    text._experts_implementation = OURS if kind.startswith("ours") else kind.removeprefix("peft, ")
    model = torch.nn.Module()
    model.mlp = torch.nn.Module()
    model.mlp.experts = Qwen3VLMoeTextExperts(text)
    for name, weight in list(model.mlp.experts.named_parameters()):
        value = torch.nn.init.normal_(weight, std=0.02).detach()
        packed = quantise_experts(value) if kind == "ours, NF4" else torch.nn.Parameter(value, requires_grad=False)
        setattr(model.mlp.experts, name, packed)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=SIZES["rank"], lora_alpha=8, target_modules=[], target_parameters=names, init_lora_weights=False)
    adapted = peft.get_peft_model(SimpleModel(model), prepare_experts(model, config) if kind.startswith("ours") else config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted.base_model.model.inner.mlp.experts


class SimpleModel(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner
        self.config = SimpleNamespace(model_type="none", tie_word_embeddings=False)


def measure(kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    experts = layer(kind)
    x = torch.randn(SIZES["tokens"], SIZES["hidden"], requires_grad=True)
    chosen = torch.rand(SIZES["tokens"], SIZES["experts"]).topk(SIZES["top_k"]).indices
    shares = torch.full(chosen.shape, 1 / SIZES["top_k"])
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    seconds = []
    for _ in range(STEPS):
        begin = time.process_time()
        experts(x, chosen, shares).square().mean().backward()
        seconds.append(time.process_time() - begin)
    return {"cpu_s": round(statistics.median(seconds), 4), "memory_mb": round((held("VmHWM") - before) / 1024, 1)}


def held(name: str) -> int:
    """KiB, of /proc/self/status."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", choices=KINDS)
    arguments = parser.parse_args()
    if arguments.kind:
        print(json.dumps(measure(arguments.kind)))
        return
    found: dict[str, Any] = {"sizes": SIZES, "steps": STEPS, "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or None}
    for kind in KINDS:
        result = subprocess.run([sys.executable, __file__, "--kind", kind], capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{kind}: {result.stderr[-3000:]}")
        found[kind] = json.loads(result.stdout.splitlines()[-1])
        print(kind, found[kind], flush=True)
    for kind in KINDS[:-1]:
        ratios = {f"{name.partition('_')[0]}_ratio": round(found[kind][name] / found[KINDS[-1]][name], 3) for name in found[kind]}
        found[kind] |= ratios
        print(kind, "to PEFT:", ratios)
    if arguments.out:
        write_json(arguments.out, {"command": "python " + " ".join(sys.argv), **found})


if __name__ == "__main__":
    main()
