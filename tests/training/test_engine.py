"""What is offloaded changes no number, and its checkpoints continue where nothing is offloaded, and back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import losses_of, write_config
from vlm_dist import load_config, train
from vlm_dist.deepspeed_config import deepspeed_config
from vlm_dist.errors import ConfigError, MachineError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # DeepSpeed compiles its operators here
FORMS = {"plain": [], "optimizer-1": ["engine.zero_stage=1", "engine.offload=optimizer"],
         "optimizer-2": ["engine.zero_stage=2", "engine.offload=optimizer"],
         "all-3": ["engine.offload=all"]}  # fmt: skip


@pytest.fixture
def run(settings, tmp_path):
    settings["data"]["heldout"] = []

    def start(name: str, *overrides: str) -> Path:
        train(load_config(write_config(settings, tmp_path), [f"name={name}", *overrides]))
        return Path(settings["output_dir"]) / name

    return start


def test_offloaded(run):
    """Losses of each form (the optimizer is DeepSpeed's own, compiled here), and a checkpoint of each continued by the next."""
    expected = losses_of(run("plain"))
    folders = {name: run(name, *options) for name, options in FORMS.items()}
    for folder in folders.values():
        assert losses_of(folder) == pytest.approx(expected, rel=1e-4)
    names = list(FORMS)
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        shutil.rmtree(folders[name] / "checkpoints" / "step-00000004")
        (folders[name] / "summary.json").unlink()
        run(name, *FORMS[following])
        assert losses_of(folders[name]) == pytest.approx(expected, rel=1e-4), (name, following)


def test_on_an_nvme_disk(run, tmp_path):
    options = ["engine.zero_stage=3", "engine.offload=all", f"engine.nvme_path={tmp_path}"]
    try:
        offloaded = losses_of(run("nvme", *options))
    except MachineError as error:  # no libaio, or a disk without direct I/O
        pytest.skip(str(error))
    assert offloaded == pytest.approx(losses_of(run("plain")), rel=1e-4)


@pytest.mark.parametrize("error", ["builder.MissingCUDAException('CUDA_HOME does not exist')", "TypeError('expected str, not None')"])
def test_a_compiler_for_cuda_that_is_missing(run, tmp_path, monkeypatch, error):
    """DeepSpeed asks nvcc for its version where torch has CUDA; what it raises without one is no RuntimeError."""
    from deepspeed.ops.op_builder import AsyncIOBuilder, builder

    def compile_it(*_, **__):
        raise eval(error, {"builder": builder})

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    monkeypatch.setattr(AsyncIOBuilder, "load", compile_it)
    with pytest.raises(MachineError, match=r"engine.nvme_path: .*does not work here: .*nvcc"):
        run("refused", "engine.zero_stage=3", "engine.offload=all", f"engine.nvme_path={tmp_path}")


def test_a_folder_that_asynchronous_io_cannot_use(run, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: True)
    with pytest.raises(MachineError, match=r"engine.nvme_path: .*(libaio|does not work here)"):
        run("refused", "engine.zero_stage=3", "engine.offload=all", "engine.nvme_path=/proc")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["engine.offload=optimizer", "engine.zero_stage=0"], "engine.offload=optimizer needs engine.zero_stage 1 or more, it is 0"),
        (["engine.offload=all", "engine.zero_stage=2"], "needs engine.zero_stage 3 or more, it is 2"),
        (["engine.nvme_path=/tmp"], "nothing is offloaded"),
    ],
)
def test_what_does_not_fit_is_refused(run, options, words):
    with pytest.raises(ConfigError, match=words):
        run("refused", *options)


def test_a_folder_that_is_not_there(run):
    with pytest.raises(MachineError, match="'/nowhere' is no folder"):
        run("refused", "engine.zero_stage=3", "engine.offload=all", "engine.nvme_path=/nowhere")


def test_buckets_are_no_larger_than_what_is_reduced(settings, tmp_path):
    """DeepSpeed's default would take 2 GB beside adapters of some kB; what is given in engine.deepspeed counts."""
    config = load_config(write_config(settings, tmp_path), ["engine.zero_stage=2"])
    assert deepspeed_config(config, 1, "float32", 1000)["zero_optimization"]["reduce_bucket_size"] == 1000
    assert deepspeed_config(config, 1, "float32", 10**10)["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    more = load_config(write_config(settings, tmp_path), ["engine.deepspeed={zero_optimization: {reduce_bucket_size: 77}}"])
    assert deepspeed_config(more, 1, "float32", 1000)["zero_optimization"]["reduce_bucket_size"] == 77


@pytest.mark.parametrize(
    ("options", "overlaps"),
    [
        (["lora=null", "model.load_in_4bit=false", "engine.zero_stage=2"], True),
        (["lora=null", "model.load_in_4bit=false", "engine.zero_stage=3"], True),
        (["engine.offload=all"], True),
        (["engine.offload=optimizer", "engine.zero_stage=1"], False),
        (["engine.zero_stage=3"], False),  # adapters: little to send
    ],
)
def test_what_a_card_does_meanwhile(settings, tmp_path, options, overlaps):
    config = load_config(write_config(settings, tmp_path), options)
    here, on_gpu = (deepspeed_config(config, 2, "bfloat16", on_gpu=value)["zero_optimization"] for value in (False, True))
    assert here["overlap_comm"] is False and on_gpu["overlap_comm"] is overlaps
    for place in ("offload_optimizer", "offload_param"):
        assert (place in here) == (place in on_gpu)
        assert place not in here or (here[place]["pin_memory"], on_gpu[place]["pin_memory"]) == (False, True)
