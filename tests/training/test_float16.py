"""float16 with a scaled loss: the numbers of float32, at every ZeRO stage; an overflow is no fault; a continued run is the same run."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch

from tests.conftest import losses_of, write_config
from tests.faults.test_fuzz import STATE
from vlm_dist import load_config, train
from vlm_dist.checkpoints.contents import problem_of
from vlm_dist.checkpoints.form import read_state
from vlm_dist.config_model import ModelConfig
from vlm_dist.models.load import load_model
from vlm_dist.run_dir import read_jsonl
from vlm_dist.training import loss_scale

pytestmark = pytest.mark.slow


@pytest.fixture
def run(settings, tmp_path):
    settings["data"]["heldout"] = []

    def start(name: str, *overrides: str):
        train(load_config(write_config(settings, tmp_path), [f"name={name}", *overrides]))
        return tmp_path / "runs" / name

    return start


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_thirty_steps_beside_float32(run, checkpoint, family):
    options = [f"model.name={checkpoint(family)}", "training.steps=30", "checkpoint.save_every=0"]
    whole, half = (losses_of(run(dtype, *options, f"model.dtype={dtype}")) for dtype in ("float32", "float16"))
    assert half == pytest.approx(whole, rel=1e-2) and half != whole


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_overflows_at_every_stage(run, monkeypatch, stage):
    """From a factor that is too large: it falls until the gradients of the first step fit; no step is left out, and none is blamed."""
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**30)
    folder = run("large", "model.dtype=float16", "training.steps=3", f"engine.zero_stage={stage}", "checkpoint.save_every=0")
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    overflows = [row for row in read_jsonl(folder / "events.jsonl") if row["event"] == "overflow"]
    assert 1 < rows[-1]["loss_scale"] == 2.0 ** (30 - len(overflows)) and len(overflows) > 6
    assert all(0 < row["grad_norm"] < 100 for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["skipped_steps"] == 0 and summary["updates"] == 3
    held = read_state(folder / "checkpoints" / "step-00000003")["loss_scale"]
    assert held["value"] == rows[-1]["loss_scale"] and held["overflows"] == len(overflows) == len(held["history"])


def test_a_continued_run_is_the_same_run(run, monkeypatch):
    """Stopped while the factor moves (down, and up again after three steps): losses and factors are those of a run that went through."""
    monkeypatch.setattr(loss_scale, "GROWS_AFTER", 3)
    options = ["model.dtype=float16", "training.steps=10", "checkpoint.save_every=4", "checkpoint.keep_last=5"]
    through, again = run("through", *options), run("again", *options)
    for step in (8, 10):
        shutil.rmtree(again / "checkpoints" / f"step-{step:08d}")
    (again / "summary.json").unlink()
    run("again", *options)
    expected, found = ([(row["loss"], row["loss_scale"]) for row in read_jsonl(one / "metrics.jsonl")] for one in (through, again))
    assert found == expected and len({scale for _, scale in expected}) >= 2


def test_an_architecture_that_overflows_is_told(checkpoint, caplog):
    for family, told in (("gemma3", True), ("llava", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            name = checkpoint(family)
            model, *_ = load_model(ModelConfig(name=name, dtype="float16", load_in_4bit=False), name, torch.device("cpu"))
        assert model.dtype == torch.float16 and ("known to compute numbers above 65,504" in caplog.text) == told


def test_a_card_without_bfloat16_takes_float16(monkeypatch):
    from vlm_dist.errors import MachineError
    from vlm_dist.models.load import choose_dtype

    card = torch.device("cuda", 0)
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert choose_dtype("auto", card) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(MachineError, match=r"Tesla T4.*model.dtype=float16"):
        choose_dtype("bfloat16", card)
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32


def test_as_unsloths_notebooks_do_it(llava):
    """float16 weights under fp16 autocast and a GradScaler, as SFTConfig(fp16=True) trains on a card without bfloat16."""
    from vlm_dist import FastVisionModel

    model, processor = FastVisionModel.from_pretrained(llava, dtype=torch.float16)
    model = FastVisionModel.get_peft_model(model, r=4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}  # a GradScaler takes no gradients in float16
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.AdamW(trained, lr=1e-3)
    ids = processor.tokenizer("What colour is the sky? Blue, mostly.", return_tensors="pt").input_ids
    losses = []
    for _ in range(16):  # the first ones find the scale
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("odd", [{}, {"value": "x"}, {"value": 0.0}, {"value": None}, {"good": -1}, {"history": 3}])
def test_a_spoilt_scale_in_a_checkpoint(odd):
    state = {"used": True, "value": 65536.0, "good": 1, "overflows": 0, "history": []}
    assert problem_of(STATE | {"step": 3, "loss_scale": state}) is None
    assert "loss_scale" in (problem_of(STATE | {"step": 3, "loss_scale": state | odd if odd else {}}) or "")


@pytest.mark.parametrize("stage", [2, 3])
def test_the_next_training_of_the_process_is_not_scaled(run, stage):
    """In float32 after float16, as in a notebook: the gradients' norm is what it was before."""
    options = ["training.steps=2", "checkpoint.save_every=0", f"engine.zero_stage={stage}"]
    norms = [
        [row["grad_norm"] for row in read_jsonl(run(name, f"model.dtype={dtype}", *options) / "metrics.jsonl") if "loss" in row]
        for name, dtype in (("before", "float32"), ("half", "float16"), ("after", "float32"))
    ]
    assert norms[2] == pytest.approx(norms[0], rel=1e-5)
