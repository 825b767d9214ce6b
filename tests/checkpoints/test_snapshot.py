"""An engine's state out and in again: at every ZeRO stage, from each to the next, training goes on as if it had never stopped."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from vlm_dist import distributed
from vlm_dist.checkpoints.form import write_checkpoint
from vlm_dist.checkpoints.snapshot import gather_weights, load_checkpoint, take_snapshot
from vlm_dist.config import Config
from vlm_dist.errors import CheckpointError
from vlm_dist.families import FAMILIES
from vlm_dist.training.engine import start_engine, take_step

STATE = {"base_fingerprint": "base", "progress": {"updates": 3}}
NAMES = {"first.weight", "first.bias", "head.weight", "head.bias"}


class Model(torch.nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.first = torch.nn.Linear(6, width)
        self.frozen = torch.nn.Linear(width, width).requires_grad_(False)
        self.head = torch.nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.frozen(self.first(x)).tanh())


def engine(stage: int = 0, optimizer: str = "adamw", *, other: bool = False, lora: bool = False, width: int = 8):
    """`other`: one that starts elsewhere, from the same frozen weights."""
    torch.manual_seed(0)
    model = Model(width)
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["head"]))
    for parameter in model.parameters():
        parameter.data += 0.5 * (other and parameter.requires_grad)
    values = {
        "name": "x", "output_dir": "x", "model": {"name": "x"}, "data": {"train": "x"},
        "training": {"steps": 9, "global_batch": 2, "micro_batch": 1},
        "optim": {"lr": 0.1, "name": optimizer}, "engine": {"zero_stage": stage},
    }  # fmt: skip
    return start_engine(model, FAMILIES["llava"], Config.model_validate(values), torch.float32, distributed.start())


def advance(engine, first: int, steps: int) -> None:
    """Two micro-batches a step; the same data for the same step."""
    for step in range(first, first + steps):
        for half in range(2):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + half))
            engine.backward((engine(x) - 1).square().mean(), scale_wrt_gas=False)
            take_step(engine, 1.0)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    """Steps are counted apart from the moments, and only at stage 0."""
    found, expected = ({name: value for name, value in side.items() if not name.endswith("/step")} for side in (found, expected))
    assert found.keys() == expected.keys() and found
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_from_each_stage_to_the_next(stage, tmp_path):
    one = engine(stage)
    advance(one, 0, 3)
    taken = take_snapshot(one, keep=True)
    assert taken.weights.keys() == NAMES and taken.adapter is None
    assert taken.weights["first.weight"].shape == (8, 6) == taken.moments["first.weight/exp_avg"].shape
    path = write_checkpoint(tmp_path, 3, taken, STATE)
    advance(one, 3, 2)
    assert_same(taken.weights, load_file(path / "model.safetensors"))  # training does not touch what was taken
    assert_same(taken.moments, load_file(path / "optimizer.safetensors"))
    uninterrupted = take_snapshot(one, keep=True)
    for another in (stage, (stage + 1) % 4):
        two = engine(another, other=True)
        assert load_checkpoint(path, two, "base") == {"step": 3, "version": 3, **STATE}
        again = take_snapshot(two, keep=True)
        assert_same(again.weights, taken.weights)
        assert_same(again.moments, taken.moments)
        advance(two, 3, 2)
        continued = take_snapshot(two, keep=True)
        assert_same(continued.weights, uninterrupted.weights, rtol=1e-5, atol=1e-6)
        assert_same(continued.moments, uninterrupted.moments, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_before_the_first_update(stage, tmp_path):
    """Every step so far was left out. And who does not keep a snapshot has nothing of it."""
    one = engine(stage)
    assert take_snapshot(one, keep=False) is None and gather_weights(one, keep=False) == {}
    taken = take_snapshot(one, keep=True)
    assert taken.weights.keys() == NAMES and taken.moments == {}
    two = engine(stage, other=True)
    load_checkpoint(write_checkpoint(tmp_path, 1, taken, STATE | {"progress": {"updates": 0}}), two, "base")
    for each in (one, two):
        advance(each, 0, 2)
        assert take_snapshot(each, keep=False) is None
    assert_same(take_snapshot(two, keep=True).weights, take_snapshot(one, keep=True).weights)


def test_moments_of_one_byte(tmp_path):
    """bitsandbytes keeps tables beside them, and its step as a number."""
    one = engine(optimizer="adamw_8bit", width=1024)
    advance(one, 0, 3)
    taken = take_snapshot(one, keep=True)
    assert taken.moments["first.weight/state1"].dtype == torch.uint8
    path = write_checkpoint(tmp_path, 3, taken, STATE)
    two = engine(optimizer="adamw_8bit", other=True, width=1024)
    load_checkpoint(path, two, "base")
    for each in (one, two):
        advance(each, 3, 2)
    assert {type(entries["step"]) for entries in two.optimizer.state.values()} == {int}
    assert_same(take_snapshot(two, keep=True).weights, take_snapshot(one, keep=True).weights)


def test_of_adapters_with_the_names_that_peft_gives_them(tmp_path):
    from peft import PeftConfig, get_peft_model_state_dict

    one = engine(lora=True)
    advance(one, 0, 3)
    taken = take_snapshot(one, keep=True)
    assert_same(taken.weights, get_peft_model_state_dict(one.module))
    path = write_checkpoint(tmp_path, 3, taken, STATE)
    assert PeftConfig.from_pretrained(str(path)).r == 2
    two = engine(lora=True, other=True)
    load_checkpoint(path, two, "base")
    for each in (one, two):
        advance(each, 3, 2)
    assert_same(take_snapshot(two, keep=True).weights, take_snapshot(one, keep=True).weights)


def test_what_does_not_fit_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, 3, take_snapshot(engine(), keep=True), STATE)
    with pytest.raises(CheckpointError, match="trained on another base model"):
        load_checkpoint(path, engine(), "another")
    with pytest.raises(
        CheckpointError, match=r"other parameters than this model trains \(8 differ, e.g. base_model.model.first.lora_A.weight\)"
    ):
        load_checkpoint(path, engine(lora=True), "base")
