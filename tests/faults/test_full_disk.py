"""A disk that is full, at each command that writes besides training: one line, exit code 5 or 3, nothing half-written, and the same command
works when there is room."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment
from vlm_dist.cli.main import main
from vlm_dist.data.index_file import INDEX_NAME
from vlm_dist.disk import disk_error

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can only be mounted by root")


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Until so many bytes are free."""
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - left)))
    return filler


def files(disk: Path) -> set[str]:
    return {str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file() and path.name != "filler"}


def check_full(command: list[str], disk: Path, capsys, left: int = 0) -> None:
    """One line while the disk is full, without half-written files; then the same command ends well."""
    filler = fill(disk, left)
    code = main(command)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code in (3, 5) and "the disk is full" in line and "Traceback" not in line, line
    assert not [name for name in files(disk) if "partial" in name and (disk / name).stat().st_size], files(disk)
    filler.unlink()
    assert main(command) == 0, capsys.readouterr().err


def test_data_index(disk, shards, capsys):
    for shard in shards["qa-train"]:
        shutil.copy(shard, disk)
    check_full(["data", "index", f"{disk}/*.tar"], disk, capsys)
    check_full(["data", "index", f"{disk}/*.tar"], disk, capsys)  # over the one that is there
    assert (disk / INDEX_NAME).is_file()


@pytest.mark.parametrize("left", [0, 20_000, 300_000])
def test_data_synth(disk, capsys, left):
    command = ["data", "synth", str(disk / "made"), "--train", "300", "--heldout", "20", "--tasks", "caption", "--shard-size", "100"]
    check_full(command, disk, capsys, left)
    assert json.loads((disk / "made" / "synthetic.json").read_text())


@pytest.mark.parametrize("left", [0, 8192, 60_000])
def test_data_pack(disk, tmp_path, capsys, left):
    from PIL import Image

    Image.effect_noise((64, 64), 90).save(tmp_path / "a.png")
    records = [{"image": "a.png", "question": f"What is {number}?", "answer": "noise"} for number in range(60)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    command = ["data", "pack", str(tmp_path / "records.json"), str(disk / "packed"), "--shard-size", "20", "--processes", "1"]
    check_full(command, disk, capsys, left)
    assert {"train-00000.tar", "train-000000.tar"} & {path.name for path in (disk / "packed").iterdir()}


def test_report(disk, capsys):
    run = disk / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: demo\n")
    counts = {"step": 1, "samples": 8, "tokens": 100, "label_tokens": 10, "peak_memory_bytes": 2**30}
    speed = {"tokens_per_s": 50.0, "step_s": 2.0, "data_wait_s": 0.1, "padding_fraction": 0.1}
    (run / "metrics.jsonl").write_text(json.dumps({**counts, **speed, "loss": 5.0, "lr": 1e-3, "grad_norm": 1.0}) + "\n")
    filler = fill(disk, 4096)
    assert main(["report", str(run)]) == 5 and not (run / "report.html").exists()
    assert "the disk is full" in capsys.readouterr().err
    filler.unlink()
    assert main(["report", str(run)]) == 0 and (run / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["adapter", "merged-16bit"])
@pytest.mark.parametrize("left", [0, 12_000])
def test_export(disk, tmp_path, llava, capsys, to, left):
    import peft
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(llava)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    out = disk / "out"
    command = ["export", str(tmp_path / "adapter"), "--base-model", llava, "--to", to, "--out", str(out)]
    filler = fill(disk, left)
    assert main(command) == 5
    assert "the disk is full" in capsys.readouterr().err.strip().splitlines()[-1] and files(disk) == set() and not out.exists()
    filler.unlink()
    assert main(command) == 0 and (out / "README.md").is_file()


def test_output_that_cannot_be_written(shards, tmp_path):
    """Standard output on a full disk, or closed by its reader."""
    command = [sys.executable, "-m", "vlm_dist.cli.main", "data", "index", shards["qa-train"][0], "--out", str(tmp_path), "--json"]
    options = {"cwd": ROOT, "env": child_environment(), "stderr": subprocess.PIPE, "text": True, "timeout": 120, "check": False}
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, stdout=full, **options)
    assert ended.returncode == 5 and ended.stderr.count("\n") == 1 and "the disk is full" in ended.stderr, ended.stderr
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(command, stdout=write, **options)
    os.close(write)
    assert ended.returncode == 141 and ended.stderr == ""


def test_a_full_disk_is_known_in_every_form():
    from safetensors import SafetensorError

    text = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("cannot save") from error
    except RuntimeError as error:
        caused = error
    assert (
        all(map(disk_error, (text, caused, OSError(122, "x"), OSError(5, "x"))))
        and disk_error(OSError(111, "x")) is None
        and disk_error(ValueError("x")) is None
    )
