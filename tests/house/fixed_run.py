"""What a run with a fixed seed leaves, and what the commands say of it, as one JSON value without times, places and machine.

python -m tests.house.fixed_run > tests/house/fixed_run.json    # only where a change of behaviour is meant
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import write_config

OF_THE_MACHINE = re.compile(r"(_s|_bytes|goodput|seconds|^bytes|^saved|^config_sha256)$")  # not of the run
SETTINGS: dict[str, Any] = {
    "name": "fixed",
    "model": {"load_in_4bit": True, "dtype": "float32"},
    "lora": {"r": 4, "dropout": 0.1},
    "data": {"max_seq_length": 256, "shuffle_window": 30},
    "optim": {"lr": 1e-3},
    "training": {"steps": 4, "global_batch": 4, "micro_batch": 2},
    "evaluation": {"every": 2, "samples": 4, "max_new_tokens": 4, "metrics": ["token_f1", "anls"]},
    "checkpoint": {"save_every": 2, "best_metric": "token_f1"},
    "log": {"wandb": "disabled"},
}


def fixed_run() -> dict[str, Any]:
    """In a folder whose name is always as long: YAML breaks long lines."""
    with tempfile.TemporaryDirectory(prefix="fixed-", dir="/tmp") as place:
        return _run(Path(place))


def _run(folder: Path) -> dict[str, Any]:
    """Train, continue, and ask every command that prints facts."""
    from vlm_dist.data.synthetic import synthesise
    from vlm_dist.testing import tiny_checkpoint

    form = {"seed": 1, "size": 32, "image_format": "png", "shard_size": 20, "questions_per_picture": 3}
    synthesise(folder / "data", train=40, heldout=8, tasks=("caption", "qa"), **form)
    base = str(tiny_checkpoint("llava", folder / "base"))
    data = {**SETTINGS["data"], "train": f"{folder}/data/qa-train-*.tar", "heldout": f"{folder}/data/qa-heldout-*.tar"}
    settings = SETTINGS | {"output_dir": str(folder), "model": {**SETTINGS["model"], "name": base}, "data": data}
    config, run = str(write_config(settings, folder)), folder / "fixed"
    picture = str(run / "samples" / "thumbnails" / "00000.png")
    said = {
        "dry run": _asked("train", config, "--dry-run", "--json"),
        "train": _asked("train", config, "--json"),
        "again": _asked("train", config, "--json"),
        "inspect": _asked("inspect", config, "-n", "2", "--json"),
        "plan": _asked("plan", config, "--gpu", "rtx4090", "--json"),
        "order": _asked("data", "order", config, "--steps", "2", "--json"),
        "verify": _asked("data", "verify", f"{folder}/data/qa-train-*.tar", "--json"),
        "checkpoints": _asked("checkpoints", str(run), "--verify", "--json"),
        "eval": _asked("eval", str(run), "--json"),
        "generate": _asked("generate", str(run), "--image", picture, "--prompt", "What is it?", "--json"),
        "export": _asked("export", str(run), "--to", "merged-16bit", "--json"),
    }
    left = {
        "files": sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()),
        "config.yaml": (run / "config.yaml").read_text(),
        "metrics.jsonl": _lines(run / "metrics.jsonl"),
        "samples": [_lines(run / "samples" / f"{name}.jsonl") for name in ("before", "after")],
        "state.json": [json.loads(path.read_text()) for path in sorted(run.glob("checkpoints/*/state.json"))],
        "tensors": {path.relative_to(run).as_posix(): _tensors(path) for path in sorted(run.rglob("*.safetensors"))},
    }
    return _clean({"said": said, "left": left}, str(folder))


def _asked(*words: str) -> Any:
    from vlm_dist.cli.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(words)
    assert code == 0, f"vlm-dist {' '.join(words)}: exit code {code}"
    text = out.getvalue()
    return json.loads(text[re.search(r"^[\[{]", text, re.M).start() :])  # training says its steps first


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _tensors(path: Path) -> dict[str, Any]:
    """Shape, sum and norm of each tensor, and the file's own words."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).double()
            found[name] = [list(tensor.shape), float(tensor.sum()), float(tensor.norm())]
        return found | {"metadata": file.metadata()}


def _clean(value: Any, folder: str) -> Any:
    """The folder becomes ~; what depends on the machine becomes null."""
    if isinstance(value, dict):
        return {key: None if OF_THE_MACHINE.search(key) else _clean(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, folder) for item in value]
    return value.replace(folder, "~") if isinstance(value, str) else value


if __name__ == "__main__":
    json.dump(fixed_run(), sys.stdout, indent=1, ensure_ascii=False)
    print()
