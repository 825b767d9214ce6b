"""`vlm-dist init`: what it writes loads and fits by the table, it asks on a terminal only, and never overwrites."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment, command
from vlm_dist.cli.main import main
from vlm_dist.config_load import load_config
from vlm_dist.planning.first import COUNTED, SUGGESTED, first_settings, known
from vlm_dist.planning.gpus import GPUS


@pytest.mark.parametrize("family", SUGGESTED)
def test_every_model_on_every_card_loads(family, tmp_path, capsys):
    for gpu in ("a10", "rtx4090", "l40s", "h100", "b200"):
        assert main(["init", str(tmp_path / gpu), "--model", family, "--gpu", gpu, "--data", "data/x-{000..009}.tar", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        (path,) = told["written"]
        config = load_config(path)
        chosen = told["chosen"]
        assert config.model.name == SUGGESTED[family] and chosen["family"] == family
        assert config.model.load_in_4bit == chosen["load_in_4bit"] and config.data.max_seq_length == chosen["max_seq_length"]
        assert (
            config.model.gradient_checkpointing == chosen["gradient_checkpointing"] and config.training.micro_batch == chosen["micro_batch"]
        )
        assert chosen["fits"] == (chosen["gigabytes"] <= GPUS[gpu].memory / 1e9 + 0.1)
        assert all(
            "#" in line for line in re.findall(r"^  \w+: (?:true|false|\d+ ).*", Path(path).read_text(), re.M) if "language" not in line
        )


def test_the_table_is_what_plan_counted():
    rows = json.loads((ROOT / "docs/benchmarks/memory_table.json").read_text())["rows"]
    for billions, (weights, recomputed, kept) in COUNTED.items():
        row = next(row for row in rows if row["name"] == f"qwen2.5-vl-{billions}b")
        modes = {name: mode["total"] / 1e9 for name, mode in row["one_row"].items()}
        held = sum(
            size for name, size in row["one_row"]["none"]["memory"].items() if "base" in name or name in ("its scales", "trainable weights")
        )
        assert (weights, recomputed, kept) == pytest.approx((held / 1e9, modes["all"], modes["none"]), abs=0.06)


def test_settings_follow_the_card():
    """A larger card never gets less; what 24 GB and 80 GB take agrees with the table of docs/memory.md."""
    model = known("Qwen/Qwen2.5-VL-7B-Instruct")
    small, large = first_settings(model, GPUS["rtx4090"]), first_settings(model, GPUS["h100"])
    assert (small.load_in_4bit, small.gradient_checkpointing, small.micro_batch) == (True, False, 1)
    assert (large.load_in_4bit, large.gradient_checkpointing, large.micro_batch) == (False, False, 4)
    big = known("Qwen/Qwen2.5-VL-32B-Instruct")
    assert first_settings(big, GPUS["rtx4090"]).gradient_checkpointing and not first_settings(big, GPUS["h100"]).gradient_checkpointing
    tight = first_settings(big, GPUS["a10"])
    assert tight.max_seq_length == 1024 and tight.pixels == (256 * 784, 512 * 784)
    assert not first_settings(known("Qwen/Qwen2.5-VL-72B-Instruct"), GPUS["a10"]).fits


def test_size_and_family_of_a_name():
    for family, name in SUGGESTED.items():
        assert known(name).family == family and known(name).why == "its name", name
    assert known("a/SmolVLM-256M-Instruct").billions == 0.256 and known("a/nameless").why == "nothing tells; assumed"


def test_a_folder_with_a_checkpoint_trains_as_written(qwen, shards, tmp_path, monkeypatch, capsys):
    """Size and family from its files; the bounds of pictures are what its processor takes; paths are right from the new folder."""
    monkeypatch.chdir(tmp_path)
    relative = os.path.relpath(qwen)
    data = os.path.relpath(Path(shards["qa-train"][0]).parent / "qa-train-*.tar")
    assert main(["init", "sub/new", "--model", relative, "--gpu", "l4", "--data", data, "--name", "mine", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chosen"]["family"] == "qwen2_5_vl" and told["chosen"]["billions"] < 0.01 and told["next"][0] == "cd sub/new"
    monkeypatch.chdir("sub/new")
    assert main(["train", "configs/mine.yaml", "--dry-run", "training.global_batch=4", "training.micro_batch=1"]) == 0


def test_data_that_is_to_be_packed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chats.json").write_text("[]")
    assert main(["init", "--data", "chats.json", "--gpu", "h100", "--name", "packed"]) == 0
    assert "vlm-dist data pack chats.json data/chats --heldout 200" in capsys.readouterr().out
    config = load_config("configs/packed.yaml")
    assert config.data.train == ["data/chats/train-*.tar"] and config.data.heldout == ["data/chats/heldout-*.tar"]


def test_nothing_is_overwritten_and_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--quickstart"]) == 0
    before = Path("configs/quickstart.yaml").read_text()
    Path("configs/quickstart_base.yaml").unlink()
    capsys.readouterr()
    assert main(["init", "--quickstart"]) == 2
    assert "configs/quickstart.yaml' exists already" in capsys.readouterr().err
    assert Path("configs/quickstart.yaml").read_text() == before and not Path("configs/quickstart_base.yaml").exists()
    for words, part in (
        (["--gpu", "gtx9"], "no card 'gtx9'"),
        (["--gpu", "l4", "--name", "a/b"], "--name: found 'a/b'"),
        (["--quickstart", "--gpu", "l4"], "leave --gpu away"),
    ):
        assert main(["init", *words]) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1
    assert main(["init", "--gpu", "l4", "--model", "./nothing"]) == 4


def test_it_asks_on_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("init"), stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=child_environment(TERM="dumb")
    )
    os.close(theirs)
    os.write(ours, b"smolvlm\nl40s\nmore/*.tar\n")
    assert process.wait(timeout=120) == 0
    os.close(ours)
    (path,) = (tmp_path / "configs").glob("*.yaml")
    config = load_config(path)
    assert config.model.name == SUGGESTED["smolvlm"] and config.data.train == ["more/*.tar"] and "l40s" in path.read_text()
