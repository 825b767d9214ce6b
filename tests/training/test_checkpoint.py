"""Checkpoints are whole or not there, and say so; damage is found, and passed over by name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.errors import CheckpointError
from vlm_dist.testing import tiny_checkpoint
from vlm_dist.training.checkpoint import find_checkpoints, newest_good_checkpoint, verify_checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards, llava) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    settings = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "model": {"name": llava},
        "lora": {"r": 4},
        "data": {"train": shards["qa-train"], "max_seq_length": 256},
        "training": {"steps": 4, "global_batch": 2},
        "checkpoint": {"save_every": 1, "keep_last": 3},
        "log": {"wandb": "disabled"},
    }
    train(load_config(write_config(settings, folder)))
    return folder / "runs" / "tiny"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "tiny"))


def test_form(run):
    """PEFT reads a checkpoint as it is; no file is a pickle; only the last three are kept."""
    from peft import PeftConfig
    from safetensors import safe_open

    found = find_checkpoints(run / "checkpoints")
    assert [path.name for path in found] == ["step-00000004", "step-00000003", "step-00000002"]
    names = {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json", "MANIFEST.json"}
    for path in found:
        assert names <= {file.name for file in path.iterdir()} <= names | {"README.md"}
        assert verify_checkpoint(path) is None
    assert PeftConfig.from_pretrained(str(found[0])).r == 4
    with safe_open(found[0] / "adapter_model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float32"}  # noqa: SIM118
    state = json.loads((found[0] / "state.json").read_text())
    assert state["step"] == 4 and state["data"]["samples"] == 8 and {"rng", "config_sha256", "base_fingerprint"} <= set(state)


def test_peft_loads_a_checkpoint(run, llava):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(llava)
    model = PeftModel.from_pretrained(base, str(find_checkpoints(run / "checkpoints")[0]))
    assert any(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "one bit"])
def test_damage_is_found_and_passed_over_by_name(run, name, damage, caplog):
    newest = find_checkpoints(run / "checkpoints")[0]
    file = newest / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 16
        file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        good = newest_good_checkpoint(run / "checkpoints")
    assert good is not None and good.name == "step-00000003"
    assert "step-00000004" in caplog.text and name in caplog.text


def test_all_damaged(run):
    for path in find_checkpoints(run / "checkpoints"):
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints is whole"):
        newest_good_checkpoint(run / "checkpoints")


def test_newest_is_by_step_not_by_clock(run):
    import os

    os.utime(find_checkpoints(run / "checkpoints")[0], (0, 0))
    assert newest_good_checkpoint(run / "checkpoints").name == "step-00000004"


def test_another_base_is_refused(run, tmp_path):
    """A base of the same shapes with other weights: nothing but the fingerprint tells."""
    config = load_config(run / "config.yaml", [f"output_dir={tmp_path / 'runs'}"])
    other = tiny_checkpoint("llava", tmp_path / "other", seed=9)
    (run / "summary.json").unlink()
    changed = config.model_copy(update={"model": config.model.model_copy(update={"name": str(other)})})
    with pytest.raises(CheckpointError, match="another base model"):
        train(changed, resume_anyway=True)


def test_an_interrupted_save_leaves_nothing_that_counts(run):
    partial = run / "checkpoints" / ".step-00000009.partial"
    shutil.copytree(find_checkpoints(run / "checkpoints")[0], partial)
    assert newest_good_checkpoint(run / "checkpoints").name == "step-00000004"
