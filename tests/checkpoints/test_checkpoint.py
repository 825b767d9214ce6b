"""Checkpoints are whole or not there, and say so; damage is found, and passed over by name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.checkpoints.form import find_checkpoints, newest_good_checkpoint, prune, verify_checkpoint
from vlm_dist.cli.main import main
from vlm_dist.errors import CheckpointError, ConfigError
from vlm_dist.run_dir import read_jsonl
from vlm_dist.testing import tiny_checkpoint


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
    assert (
        state["step"] == 4
        and state["data"]["lanes"] == {"0": {"counts": [4]}, "1": {"counts": [4]}}
        and {"rng", "config_sha256", "base_fingerprint"} <= set(state)
    )


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


def test_written_beside_the_training_or_not_it_is_the_same(trained, tmp_path):
    """Bytes of the last checkpoint; and what each save cost is told."""
    config = load_config(trained / "config.yaml", [f"output_dir={tmp_path}", "checkpoint.write_async=false"])
    train(config)
    here = tmp_path / "tiny" / "checkpoints" / "step-00000004"
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (here / name).read_bytes() == (trained / "checkpoints" / "step-00000004" / name).read_bytes()
    saves = [row for row in read_jsonl(trained / "events.jsonl") if row["event"] == "checkpoint"]
    assert [row["step"] for row in saves] == [1, 2, 3, 4] and all(row["stall_s"] > 0 and row["write_s"] > 0 for row in saves)


def test_the_best_are_kept(run):
    """By the score in state.json; those without one count for nothing."""
    folder = run / "checkpoints"
    for step, score in ((2, 0.5), (3, 0.9)):
        state = json.loads((folder / f"step-0000000{step}" / "state.json").read_text())
        (folder / f"step-0000000{step}" / "state.json").write_text(json.dumps({**state, "scores": {"exact_match": score}}))
    assert [path.name for path in prune(folder, keep_last=1, keep_best=1)] == ["step-00000002"]
    assert [path.name for path in find_checkpoints(folder)] == ["step-00000004", "step-00000003"]


def test_scores_stand_in_the_checkpoint(trained, shards, tmp_path):
    more = ["evaluation.every=2", "evaluation.samples=2", "evaluation.max_new_tokens=2", f"data.heldout=[{shards['qa-heldout'][0]}]"]
    train(load_config(trained / "config.yaml", [f"output_dir={tmp_path}", *more]), resume_anyway=True)
    scores = [json.loads((path / "state.json").read_text())["scores"] for path in find_checkpoints(tmp_path / "tiny" / "checkpoints")]
    assert scores[0] is None and scores[1] is None and scores[2]["samples"] == 2  # steps 4, 3, 2


def test_a_mirror_gives_back_what_the_disk_lost(trained, tmp_path):
    """The run's folder is gone; the same command continues from the mirror, passing over a damaged copy."""
    config = load_config(trained / "config.yaml", [f"output_dir={tmp_path / 'runs'}", f"checkpoint.mirror=file://{tmp_path}/mirror"])
    train(config)
    mirror = tmp_path / "mirror" / "tiny"
    assert sorted(path.name for path in mirror.iterdir()) == ["config.yaml", "step-00000002", "step-00000003", "step-00000004"]
    assert verify_checkpoint(mirror / "step-00000004") is None
    (mirror / "step-00000004" / "state.json").write_text("{}")
    shutil.rmtree(tmp_path / "runs")
    summary = train(config)
    assert summary["step"] == 4 and len(read_jsonl(tmp_path / "runs" / "tiny" / "metrics.jsonl")) == 1  # step 4 alone


def test_a_shared_mirror(trained, tmp_path):
    """A run of another name has a folder of its own there; one of the same name with another configuration is refused, on any machine."""
    shared = f"checkpoint.mirror={tmp_path}/mirror"
    train(load_config(trained / "config.yaml", [f"output_dir={tmp_path / 'one'}", shared]))
    other = load_config(trained / "config.yaml", [f"output_dir={tmp_path / 'two'}", shared, "optim.lr=0.004"])
    with pytest.raises(ConfigError, match=r"mirror/tiny' holds checkpoints of a run of another configuration \(optim.lr: 0.\d+ -> 0.004\)"):
        train(other)
    assert train(other, resume_anyway=True)["step"] == 4 and len(read_jsonl(tmp_path / "two" / "tiny" / "metrics.jsonl")) == 0
    named = load_config(trained / "config.yaml", [f"output_dir={tmp_path / 'two'}", shared, "optim.lr=0.004", "name=other"])
    train(named)
    assert len(read_jsonl(tmp_path / "two" / "other" / "metrics.jsonl")) == 4
    assert sorted(path.name for path in (tmp_path / "mirror").iterdir()) == ["other", "tiny"]


def test_a_refused_start_leaves_the_mirror_as_it_was(trained, tmp_path, capsys):
    """Before the first checkpoint nobody owns it; a refused --resume-anyway writes nothing; a spoilt config.yaml is told by its place."""
    options = [f"output_dir={tmp_path / 'runs'}", f"checkpoint.mirror={tmp_path}/mirror"]
    stored = tmp_path / "mirror" / "tiny" / "config.yaml"
    stored.parent.mkdir(parents=True)
    stored.write_text("optim: {lr: 9}")  # of a start that came to nothing
    train(load_config(trained / "config.yaml", options))
    before = stored.read_bytes()
    with pytest.raises(CheckpointError, match="other shapes"):
        train(load_config(trained / "config.yaml", [*options, "lora.r=2", "training.steps=6"]), resume_anyway=True)
    assert stored.read_bytes() == before
    shutil.rmtree(tmp_path / "runs")
    assert train(load_config(trained / "config.yaml", options))["ended"] == "finished"
    shutil.rmtree(tmp_path / "runs")
    stored.write_text("")
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror: .*mirror/tiny/config\.yaml: expected keys"):
        train(load_config(trained / "config.yaml", options))


def test_a_mirror_that_cannot_be_used(trained, tmp_path):
    (tmp_path / "file").write_text("")
    config = load_config(trained / "config.yaml", [f"output_dir={tmp_path / 'runs'}", f"checkpoint.mirror={tmp_path}/file/mirror"])
    with pytest.raises(CheckpointError, match=r"checkpoint\.mirror: '.*/file/mirror/tiny' cannot be used"):
        train(config)


def test_a_mirror_that_fails_on_the_way_ends_nothing(trained, tmp_path):
    mirror = tmp_path / "mirror"
    options = [f"output_dir={tmp_path / 'runs'}", f"checkpoint.mirror={mirror}"]
    train(load_config(trained / "config.yaml", options))
    for path in ("checkpoints/step-00000004", "checkpoints/step-00000003"):
        shutil.rmtree(tmp_path / "runs" / "tiny" / path)
    (tmp_path / "runs" / "tiny" / "summary.json").unlink()
    shutil.rmtree(mirror)
    mirror.write_text("")
    assert train(load_config(trained / "config.yaml", options))["ended"] == "finished"
    told = [row for row in read_jsonl(tmp_path / "runs" / "tiny" / "events.jsonl") if row["event"] == "mirror failed"]
    assert [row["step"] for row in told] == [0, 3, 4] and "cannot be used" in told[0]["text"] and "cannot be written" in told[1]["text"]


def test_the_command_lists_verifies_and_prunes(run, capsys):
    assert main(["checkpoints", str(run), "--verify", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["problem"]) for row in rows] == [(4, None), (3, None), (2, None)] and rows[0]["bytes"] > 1000
    (run / "checkpoints" / "step-00000003" / "optimizer.safetensors").unlink()
    assert main(["checkpoints", str(run), "--verify"]) == 5
    shown = capsys.readouterr().out
    assert "step-00000003" in shown and "optimizer.safetensors is missing" in shown and "whole" in shown
    assert main(["checkpoints", str(run), "--prune", "1"]) == 0
    assert [path.name for path in find_checkpoints(run / "checkpoints")] == ["step-00000004"]
    assert main(["checkpoints", str(run / "nowhere")]) == 2 and "no run" in capsys.readouterr().err
