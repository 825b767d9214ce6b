"""Bad input ends in one clear line and an exit code that is not 0; nothing is lost, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment, run_command, write_config
from vlm_dist.cli.main import main
from vlm_dist.distributed import free_port


def fails(capsys, *arguments: str) -> tuple[int, str]:
    """Run the command in this process; its one line on standard error and its exit code."""
    capsys.readouterr()
    code = main(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert code != 0
    assert len(lines) == 1 and lines[0].startswith("vlm-dist: "), lines
    return code, lines[0]


def change(settings, path: str, value):
    node = settings
    *parents, last = path.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("optim.lrr", 1, "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("training.steps", "ten", 'training.steps="ten"'),
        ("data.train", "nothing-*.tar", "no shard matches 'nothing-*.tar'"),
        ("model.name", "./nowhere", "'./nowhere' holds no checkpoint"),
        ("model.name", "nobody/nothing", "is no folder here and cannot be had from the hub"),
        ("training.micro_batch", 3, "not a multiple"),
        ("engine", {"deepspeed": {"bf16": {"enabled": True}}}, "engine.deepspeed.bf16 is decided by"),
        ("engine", {"zero_stage": 2, "deepspeed": {"zero_optimization": {"stage": 3}}}, "contradicts engine.zero_stage"),
    ],
)
def test_configuration(settings, tmp_path, capsys, path, value, words):
    change(settings, path, value)
    path = str(write_config(settings, tmp_path))
    assert words in fails(capsys, "train", path)[1]
    if "hub" not in words:
        assert words in fails(capsys, "train", path, "--dry-run")[1]


def test_a_command_of_its_own_shows_no_traceback(settings, tmp_path):
    change(settings, "model.name", "./nowhere")
    result = run_command("train", str(write_config(settings, tmp_path)))
    assert result.returncode == 4
    assert result.stderr.strip().splitlines()[-1].startswith("vlm-dist: model.name: './nowhere' holds no checkpoint")
    assert "Traceback" not in result.stderr + result.stdout
    debug = run_command("--debug", "train", str(write_config(settings, tmp_path)))
    assert "Traceback" in debug.stderr and debug.returncode != 0


def test_8_bit_moments_are_not_sharded(settings, tmp_path, capsys):
    change(settings, "optim.name", "adamw_8bit")
    _, line = fails(capsys, "train", str(write_config(settings, tmp_path)), "engine.zero_stage=2")
    assert "adamw_8bit cannot be sharded" in line


def test_batch_that_the_ranks_cannot_share(settings, tmp_path):
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = run_command("train", str(write_config(settings, tmp_path)), "--dry-run", **group)
    assert done.returncode == 2
    line, why = done.stderr.strip().splitlines()
    assert "training.global_batch=4 is not a multiple of micro_batch x ranks = 2 x 3; use 6" in line
    assert "RANK=0 and WORLD_SIZE=3 say that there are some" in why


def test_a_shard_that_is_no_tar(settings, tmp_path, capsys):
    (tmp_path / "x.tar").write_text("hello" * 1000)
    change(settings, "data.train", str(tmp_path / "x.tar"))
    code, line = fails(capsys, "train", str(write_config(settings, tmp_path)))
    assert code == 3 and "x.tar' is not a tar file" in line
    fails(capsys, "train", str(write_config(settings, tmp_path)), "--dry-run")
    assert json.loads((Path(settings["output_dir"]) / "tiny" / "summary.json").read_text())["ended"] == "failed"


def test_an_empty_data_set(settings, tmp_path, capsys):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    change(settings, "data.train", str(tmp_path / "empty.tar"))
    _, line = fails(capsys, "train", str(write_config(settings, tmp_path)))
    assert "hold no sample" in line


def test_all_labels_masked(settings, tmp_path, capsys):
    """Nothing that is supervised fits the length: each sample is named, and the run stops."""
    settings["data"].update(max_seq_length=12, on_too_long="truncate", heldout=[], max_bad_fraction=1)
    change(settings, "training.steps", 40)
    _, line = fails(capsys, "train", str(write_config(settings, tmp_path)))
    assert "none of the first 50 samples is usable" in line and "no supervised token" in line
    assert (Path(settings["output_dir"]) / "tiny" / "quarantine.jsonl").exists()


def test_a_run_directory_of_another_configuration(settings, tmp_path, capsys):
    config = str(write_config(settings, tmp_path))
    assert main(["train", config]) == 0
    _, line = fails(capsys, "train", config, "optim.lr=0.5", "lora.r=8")
    assert "optim.lr: 0.001 -> 0.5" in line and "lora.r: 4 -> 8" in line and "--resume-anyway" in line
    assert main(["train", config, "log.every=3"]) == 0  # decides no number
    assert main(["train", config, "training.steps=6", "--resume-anyway"]) == 0
    assert json.loads((Path(settings["output_dir"]) / "tiny" / "summary.json").read_text())["step"] == 6


def test_bfloat16_where_there_is_none(settings, tmp_path, monkeypatch):
    """A Turing GPU (compute capability 7.5), as torch would describe it."""
    import torch

    from vlm_dist.errors import MachineError
    from vlm_dist.models.load import choose_dtype

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    with pytest.raises(MachineError, match=r"Tesla T4\) has no bfloat16 .* use model.dtype=float16"):
        choose_dtype("bfloat16", torch.device("cuda", 0))
    assert choose_dtype("auto", torch.device("cuda", 0)) == torch.float16
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


def test_unsupported_architecture(settings, tmp_path, capsys):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8).save_pretrained(tmp_path / "text-only")
    change(settings, "model.name", str(tmp_path / "text-only"))
    code, line = fails(capsys, "train", str(write_config(settings, tmp_path)))
    assert code == 4 and "'llama' is a text-only language model" in line


def test_a_loss_that_is_no_number(settings, tmp_path, capsys):
    code, line = fails(capsys, "train", str(write_config(settings, tmp_path)), "optim.lr=1e30", "optim.grad_clip=0", "training.steps=20")
    assert code == 7 and "whose loss or gradient is no finite number" in line
    assert json.loads((Path(settings["output_dir"]) / "tiny" / "summary.json").read_text())["ended"] == "failed"


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can only be mounted by root")
@pytest.mark.parametrize("left", [0, 20_000])
def test_disk_full_while_saving(settings, tmp_path, left):
    """On a real file system of 1 MiB, at different points of the save: one clear line, and the checkpoint before it is whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        settings["output_dir"] = str(disk / "runs")
        settings["data"]["heldout"] = []
        config = str(write_config(settings, tmp_path))
        code = (
            "import sys, pathlib, shutil\n"
            "from vlm_dist.checkpoints import saver\n"
            "from vlm_dist.cli.main import main\n"
            "write = saver.write_checkpoint\n"
            "def fill_then_write(folder, step, *rest):\n"
            "    if step == 2:\n"
            f"        free = shutil.disk_usage({str(disk)!r}).free\n"
            f"        pathlib.Path({str(disk)!r}, 'filler').write_bytes(bytes(max(0, free - {left})))\n"
            "    return write(folder, step, *rest)\n"
            "saver.write_checkpoint = fill_then_write\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, "train", config, "checkpoint.save_every=1", "lora.r=1", "checkpoint.write_async=false"],
            capture_output=True, text=True, cwd=ROOT, env=child_environment(), timeout=300, check=False,
        )  # fmt: skip
        assert result.returncode == 5, result.stderr
        line = result.stderr.strip().splitlines()[-1]
        named = re.search(r"(step-\d+), is intact", line)
        assert named and "the disk is full" in line and "run the same command again" in line
        assert "Traceback" not in result.stderr
        from vlm_dist.checkpoints.form import newest_good_checkpoint, verify_checkpoint

        good = newest_good_checkpoint(disk / "runs" / "tiny" / "checkpoints")
        assert good is not None and good.name == named[1] and verify_checkpoint(good) is None
        assert all(verify_checkpoint(path) is None for path in good.parent.iterdir())
        (disk / "filler").unlink()
        resumed = run_command("train", config, "checkpoint.save_every=1", "lora.r=1", "--resume-anyway", "checkpoint.keep_last=1")
        assert "continuing from" in resumed.stdout and resumed.returncode == 0, resumed.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)
