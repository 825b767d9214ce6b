"""Tiny Qwen2.5-VL and LLaVA trained 4 steps, with evaluation and a checkpoint, in many settings: the losses are the CPU's within 2 %.

In order of importance, while there is time: ZeRO 0 to 3 x {NF4, 16 bit}, then the options below.
One run is cut off after its first checkpoint and goes on; one is merged and compared.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from part import ROOT, Part

WITHIN = 0.02
FAMILIES = ("qwen2_5_vl", "llava")
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "checkpointing off": {"model": {"gradient_checkpointing": False}},
    "packed": {"data": {"packing": True}},
    "float16": {"model": {"dtype": "float16"}},
    "kernels off": {"kernels": "off"},
    "adamw_8bit": {"optim": {"name": "adamw_8bit"}},
    "offload": {"engine": {"offload": "optimizer"}},
}  # fmt: skip
STAGES_OF = {"adamw_8bit": (0,), "offload": (1, 2, 3)}


def cases(dry: bool) -> Iterator[tuple[str, int, bool, str]]:
    """(family, stage, in NF4, option), the most important first."""
    stages = (0, 3) if dry else (0, 1, 2, 3)
    families = FAMILIES[1:] if dry else FAMILIES
    yield from ((family, stage, nf4, "") for family in families for stage in stages for nf4 in ((True,) if dry else (True, False)))
    options = list(OPTIONS)[1:]
    for option in ["packed"] if dry else options:
        for stage in STAGES_OF.get(option, (0,) if dry else (0, 3)):
            yield from ((family, stage, True, option) for family in families)


def label(case: tuple[str, int, bool, str]) -> str:
    family, stage, nf4, option = case
    return f"{family} ZeRO {stage} {'NF4' if nf4 else '16 bit'} {option}".strip()


def reference_of(case: tuple[str, int, bool, str]) -> tuple[str, int, bool, str]:
    """The case on the CPU with the same numbers: the stage, recomputing, offloading and kernels change none."""
    family, _, nf4, option = case
    return family, 0, nf4, option if option in ("packed", "adamw_8bit") else ""


def settings(folder: Path, case: tuple[str, int, bool, str], name: str) -> dict[str, Any]:
    family, stage, nf4, option = case
    shards = sorted(str(path) for path in (folder / "data").rglob("*.tar"))
    tree: dict[str, Any] = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "model": {"name": str(folder / family), "load_in_4bit": nf4, "dtype": "bfloat16"},
        "lora": {"r": 4},
        "data": {
            "train": [path for path in shards if "train" in Path(path).name],
            "heldout": [path for path in shards if "heldout" in Path(path).name],
            "max_seq_length": 256,
        },
        "optim": {"lr": 1e-3},
        "training": {"steps": 4, "global_batch": 4, "micro_batch": 2},
        "engine": {"zero_stage": stage},
        "evaluation": {"samples": 2, "max_new_tokens": 2},
        "checkpoint": {"save_every": 2},
        "log": {"wandb": "disabled"},
    }
    for section, values in OPTIONS[option].items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return tree


def train(folder: Path, case: tuple[str, int, bool, str], name: str) -> list[float]:
    """The losses of its steps."""
    from vlm_dist.config_load import parse_config
    from vlm_dist.training.train import train

    train(parse_config(json.dumps(settings(folder, case, name))))
    return losses_of(folder / "runs" / name)


def losses_of(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def make_inputs(folder: Path, families: tuple[str, ...]) -> None:
    from vlm_dist.data.synthetic import synthesise
    from vlm_dist.testing import tiny_checkpoint

    for family in families:
        tiny_checkpoint(family, folder / family)
    pictures = {"size": 32, "image_format": "jpg"}
    synthesise(folder / "data", train=20, heldout=5, tasks=("qa",), seed=1, shard_size=20, questions_per_picture=1, **pictures)


def start_references(folder: Path, wanted: list[tuple[str, int, bool, str]]) -> subprocess.Popen[bytes]:
    """The same on this computer's CPU, beside the runs on the card."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
    command = [sys.executable, __file__, "--reference", str(folder), json.dumps(wanted)]
    with (folder / "reference.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def reference(folder: Path, wanted: list[list[Any]]) -> None:
    found = {}
    for case in wanted:
        name = f"cpu-{len(found)}"
        try:
            found[label(tuple(case))] = train(folder, tuple(case), name)  # type: ignore[arg-type]
        except Exception as error:
            found[label(tuple(case))] = f"{type(error).__name__}: {error}"  # type: ignore[arg-type,assignment]
        (folder / "reference.json").write_text(json.dumps(found))


def finished(references: subprocess.Popen[bytes], path: Path) -> dict[str, Any]:
    """What the CPU computed, or as much of it as it did in two more minutes."""
    try:
        references.wait(timeout=120)
    except subprocess.TimeoutExpired:
        references.kill()
    return json.loads(path.read_text()) if path.exists() else {}


def compare(part: Part, case: tuple[str, int, bool, str], losses: list[float], expected: Any) -> None:
    if not isinstance(expected, list):
        return part.find("skipped", label(case), f"losses {[round(loss, 4) for loss in losses]}; no CPU's to compare: {expected}")
    apart = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    return part.judge(len(losses) == 4 and apart < WITHIN, label(case), f"losses within {apart:.2%} of the CPU's")


def cut(folder: Path, name: str) -> None:
    """The run "cut": as if the run `name` had been killed after its first checkpoint."""
    run = folder / "runs" / "cut"
    shutil.copytree(folder / "runs" / name, run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "summary.json").unlink()
    (run / "config.yaml").unlink()
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 2]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")


def go_on(part: Part, folder: Path, case: tuple[str, int, bool, str], losses: list[float]) -> None:
    """Steps 3 and 4 are what they were."""
    cut(folder, "case-0")
    again = train(folder, case, "cut")
    apart = max(abs(a / b - 1) for a, b in zip(again[-2:], losses[-2:], strict=True))
    part.judge(apart < 1e-3, "continued", f"steps 3 and 4 within {apart:.2%} of the uninterrupted run")


def export(part: Part, folder: Path) -> None:
    from vlm_dist.models.export import save_pretrained_merged
    from vlm_dist.serving.trained import open_trained

    trained = open_trained(str(folder / "runs" / "case-0"))
    found = save_pretrained_merged(trained.model, str(folder / "merged"), trained.encoder.processor)
    assert found is not None
    part.judge(found.same_next_token == found.samples, "exported", found)


def main() -> None:
    part = Part(__doc__)
    from vlm_dist.quiet import quiet_libraries

    quiet_libraries()
    wanted = list(cases(part.dry))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder, FAMILIES[1:] if part.dry else FAMILIES)
        references = start_references(folder, list(dict.fromkeys(reference_of(case) for case in wanted)))
        done: dict[tuple[str, int, bool, str], list[float]] = {}
        for number, case in enumerate(wanted):
            losses = part.attempt(label(case), lambda case=case, number=number: train(folder, case, f"case-{number}"))
            if losses:
                done[case] = losses
        if wanted[0] in done:
            part.attempt("continued", lambda: go_on(part, folder, wanted[0], done[wanted[0]]))
            part.attempt("exported", lambda: export(part, folder))
        expected = finished(references, folder / "reference.json")
        for case, losses in done.items():
            compare(part, case, losses, expected.get(label(reference_of(case)), "not computed in time"))
        part.results = {"losses": {label(case): losses for case, losses in done.items()}, "cpu": expected}
    part.write()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--reference"]:
        reference(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        main()
