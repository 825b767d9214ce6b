"""What uses a GPU, each run once on a card that is not there; with the lines of ours that ran.

    python -m tests.pretended.scenarios FOLDER [NAME ...]     # writes FOLDER/ran.json

A process of its own: DeepSpeed looks for a card once in a process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from scripts.cuda_branches import all_places
from tests.pretended.card import CARD, pretended_card
from tests.pretended.launches import Launches, pretended_launches
from tests.pretended.marked import listen


def parse(folder: Path, name: str) -> Any:
    from vlm_dist.config_load import parse_config

    return parse_config(json.dumps(settings(folder, name)))


def settings(folder: Path, name: str) -> dict[str, Any]:
    """A run on the tiny LLaVA and the synthetic shards of `prepare`."""
    shards = sorted(str(path) for path in (folder / "data").rglob("*.tar"))
    return {
        "name": name,
        "output_dir": str(folder / "runs"),
        "kernels": "off",
        "model": {"name": str(folder / "llava"), "load_in_4bit": True, "dtype": "bfloat16", "gradient_checkpointing": "offload"},
        "lora": {"r": 4},
        "data": {
            "train": [path for path in shards if "train" in Path(path).name],
            "heldout": [path for path in shards if "heldout" in Path(path).name],
            "max_seq_length": 256,
        },
        "optim": {"lr": 1e-3},
        "training": {"steps": 2, "global_batch": 4, "micro_batch": 2},
        "evaluation": {"samples": 2, "max_new_tokens": 2},
        "log": {"wandb": "disabled"},
    }  # fmt: skip


def prepare(folder: Path) -> None:
    from vlm_dist.data.synthetic import synthesise
    from vlm_dist.testing import tiny_checkpoint

    tiny_checkpoint("llava", folder / "llava")
    synthesise(
        folder / "data", train=20, heldout=4, tasks=("qa",), seed=1, size=32, image_format="jpg", shard_size=20, questions_per_picture=1
    )


def train(folder: Path, name: str) -> None:
    """Loading in NF4, DeepSpeed, layers' inputs in host memory, evaluation, checkpoint, adapter."""
    from vlm_dist.models import offloading
    from vlm_dist.training.train import train

    offloading.LEAST_BYTES = 1

    assert train(parse(folder, name))["ended"] == "finished"


def step(folder: Path, launches: Launches) -> None:
    """All kernels that fit, one step of them."""
    from tests.pretended.stepped import one_step

    one_step(str(folder / "llava"), CARD, launches)
    one_step(str(folder / "llava"), CARD, launches, dtype="bfloat16", packed=True)


def export(folder: Path, launches: Launches) -> None:
    """Opened to be asked, merged, and the merged one compared."""
    from vlm_dist.models.export import save_pretrained_merged
    from vlm_dist.serving.trained import open_trained

    run = str(folder / "runs" / "card")
    trained = open_trained(run)
    assert trained.model.device == CARD
    assert save_pretrained_merged(trained.model, str(folder / "merged"), trained.encoder.processor) is not None


def inspect(folder: Path, launches: Launches) -> None:
    from vlm_dist.checking.heat import Heat
    from vlm_dist.inputs.opened import inputs_apart

    with inputs_apart(parse(folder, "heat")) as inputs:
        assert Heat(inputs).model.device == CARD


def notebooks(folder: Path, launches: Launches) -> None:
    """FastVisionModel and the half precision of SFTConfig."""
    from vlm_dist import FastVisionModel
    from vlm_dist.unsloth.sft import SFTConfig

    model, _ = FastVisionModel.from_pretrained(str(folder / "llava"), load_in_4bit=True)
    assert model.device == CARD and model.dtype == torch.bfloat16
    assert SFTConfig(output_dir=str(folder / "sft"), bf16=True, report_to="none").bf16


def kernels(folder: Path, launches: Launches) -> None:
    """Those that no layer of LLaVA calls."""
    from bitsandbytes.functional import quantize_4bit

    import vlm_kernels

    q, k = (torch.randn(1, heads, 3, 8, device="cuda") for heads in (2, 1))
    cos, sin = (torch.randn(3, 1, 3, 8, device="cuda") for _ in range(2))
    assert vlm_kernels.geglu(q, q).is_cuda and vlm_kernels.mrope(q, k, cos, sin, (1, 1, 2))[0].is_cuda
    norm = torch.ones(8, device="cuda", requires_grad=True)
    vlm_kernels.rms_norm(q, norm, 1e-6).sum().backward()
    assert norm.grad is not None and norm.grad.is_cuda
    codes, state = quantize_4bit(torch.randn(64, 64, device="cuda"), quant_type="nf4", compress_statistics=True)
    low_rank = (torch.randn(4, 64, device="cuda"), torch.randn(64, 4, device="cuda"), 1.0)
    assert vlm_kernels.nf4_lora_linear(torch.randn(2, 64, device="cuda"), codes, state, adapters=(low_rank,), dropout=0.5).is_cuda
    experts, counts = torch.randn(2, 8, 64, device="cuda"), torch.tensor([3, 2], device="cuda")
    y = vlm_kernels.grouped_linear(torch.randn(5, 64, device="cuda", requires_grad=True), experts, counts)
    y.sum().backward()
    assert vlm_kernels.grouped_outer(y.detach(), y.detach(), counts).is_cuda


def experts(folder: Path, launches: Launches) -> None:
    """Products of packed experts and their gradients."""
    from tests.pretended.test_experts_on_card import computed

    for dtype in (torch.bfloat16, torch.float16):
        assert len(computed("cuda", dtype, True, False)) == 4


def machine(folder: Path, launches: Launches) -> None:
    """What the commands say of the machine."""
    from vlm_dist.cards import choose_device
    from vlm_dist.checking.doctor import examine
    from vlm_dist.cli.launch import _gpus_here
    from vlm_dist.environment import describe_environment
    from vlm_dist.errors import MachineError
    from vlm_dist.models.load import choose_dtype
    from vlm_dist.planning.gpus import this_gpu
    from vlm_dist.training.health import out_of_memory
    from vlm_dist.upstream.torch import flight_record

    found = {check.name: check for check in examine()}
    assert found["4-bit"].found.startswith("NF4 on cuda") and found["kernels"].state == "ok", found
    gpu = this_gpu()
    assert gpu is not None and gpu.name.startswith("h100") and _gpus_here(argparse.Namespace(launcher=None, address=None)) == 1
    assert describe_environment(SimpleNamespace(world_size=1, rank=0, device=CARD))["gpus"] == ["NVIDIA H100 80GB HBM3"]  # type: ignore
    assert choose_dtype("auto", CARD) == torch.bfloat16
    with mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (7, 5)):  # a card without bfloat16
        assert choose_dtype("auto", CARD) != torch.bfloat16
        with pytest.raises(MachineError):
            choose_dtype("bfloat16", CARD)
    with mock.patch.dict(os.environ):
        assert choose_device(0, "cpu").type == "cpu"
    flight_record()
    out_of_memory(parse(folder, "x"), torch.OutOfMemoryError("CUDA out of memory. Tried 1 GiB"), "")


def losses_of(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


SCENARIOS: dict[str, Callable[[Path, Launches], None]] = {
    "train": lambda folder, _: train(folder, "card"), "step": step, "export": export, "inspect": inspect, "notebooks": notebooks,
    "kernels": kernels, "experts": experts, "machine": machine,
}  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1])
    wanted: dict[str, set[int]] = {}
    for place in all_places():
        wanted.setdefault(place.file, set()).update(place.lines)
    marks = listen(wanted)
    with pretended_card():
        from deepspeed.accelerator import get_accelerator

        assert get_accelerator().device_name() == "cuda"
    if not (folder / "data").exists():
        prepare(folder)
    ran: dict[str, dict[str, list[int]]] = {}
    kernels: set[str] = set()
    chosen = sys.argv[2:] or list(SCENARIOS)  # export needs what train wrote
    for name, scenario in ((name, SCENARIOS[name]) for name in chosen):
        print(name, flush=True)
        for lines in marks.ran.values():
            lines.clear()
        with pretended_card(), pretended_launches() as launches:
            scenario(folder, launches)
        ran[name] = {file: sorted(lines) for file, lines in sorted(marks.ran.items())}
        kernels |= {launch.kernel for launch in launches}
    (folder / "ran.json").write_text(json.dumps({"lines": ran, "kernels": sorted(kernels), "losses": losses_of(folder / "runs" / "card")}))


if __name__ == "__main__":
    main()
