"""Attention by the lengths of samples: losses and gradients are those with masks, for every family that packs, and no mask is made."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.conftest import losses_of, write_config
from tests.models.test_ahead import batches, loss_and_gradients
from tests.models.test_packing import SIZES, loaded, samples, talk  # noqa: F401
from vlm_dist.config import ModelConfig
from vlm_dist.config_load import load_config
from vlm_dist.data.collate import collate_packed
from vlm_dist.data.encode import Encoder
from vlm_dist.families import FAMILIES
from vlm_dist.models.ahead import ahead_rule
from vlm_dist.models.introspect import family_of
from vlm_dist.models.load import read_model_config
from vlm_dist.models.patching import patch_model
from vlm_dist.models.patching_lengths import attend_by_lengths, needs_masks
from vlm_dist.models.positions import position_rule
from vlm_dist.models.processor import load_processor
from vlm_dist.planning.count import count_micro_batch
from vlm_dist.training.train import train

BY_LENGTHS = "attention: by the lengths of samples, without masks"


def by_lengths(model):
    """A copy that attends by lengths on this CPU, and what is told of it."""
    ours = copy.deepcopy(model)
    return ours, attend_by_lengths(ours, family_of(model), "varlen", packs=True, on_gpu=False, dtype=torch.float32)


def compare(theirs, ours, data: list[dict], monkeypatch) -> None:
    """Losses and gradients of batches; no mask of whole rows reaches attention."""
    attend, rule = torch.nn.functional.scaled_dot_product_attention, ahead_rule(ours)
    for batch in data:
        masks = []

        def watched(*given, attn_mask=None, masks=masks, **options):
            masks.append(() if attn_mask is None else tuple(attn_mask.shape))
            return attend(*given, attn_mask=attn_mask, **options)

        tokens = batch["input_ids"].shape[1]
        loss, expected = loss_and_gradients(theirs, batch)
        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
            again, found = loss_and_gradients(ours, rule(batch))
        assert masks and not any(len(mask) == 4 and mask[2:] == (tokens, tokens) for mask in masks)
        assert again == pytest.approx(loss, rel=1e-5) and found.keys() == expected.keys()
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            assert float((found[name] - gradient).abs().max()) <= 1e-5 * largest, name


def test_numbers_are_those_with_masks(loaded, samples, monkeypatch):  # noqa: F811
    """Padded rows, one row, packed rows; each layer is computed again in the backward pass."""
    model, _ = loaded
    family = family_of(model)
    ours, told = by_lengths(model)
    if family.two_way or not family.packs:
        assert f"'{family.model_type}'" in told and "masks, not" in told and not hasattr(ours, "sample_lengths")
        return
    assert told == BY_LENGTHS
    ours.train().gradient_checkpointing_enable({"use_reentrant": False})
    data = batches(model, samples)
    compare(model, ours, data, monkeypatch)
    again, _ = loss_and_gradients(ours, data[0])  # a batch without lengths, as in evaluation, has masks
    assert again == pytest.approx(loss_and_gradients(model, data[0])[0], rel=1e-6)


@pytest.mark.parametrize("name", ["pixtral", "qwen2_5_vl"])
def test_sliding_windows(name, checkpoint, monkeypatch):
    """Windows of 8 tokens count in each sample from its own beginning; with kernels on both sides."""
    path = checkpoint(name)
    config = AutoConfig.from_pretrained(path)
    text = config.get_text_config()
    text.sliding_window, text.use_sliding_window, text.layer_types = 8, True, ["sliding_attention", "full_attention"]
    model = AutoModelForImageTextToText.from_pretrained(path, config=config, dtype=torch.float32, attn_implementation="sdpa").eval()
    encoder = Encoder(load_processor(ModelConfig(name=path), path), 4096)
    found = [encoder.encode(talk(str(number), sizes, "red and blue")) for number, sizes in enumerate(SIZES)]
    ours, told = by_lengths(model)
    full = copy.deepcopy(model)
    assert told == BY_LENGTHS
    patch_model(model, "all")
    patch_model(ours, "all")
    data = batches(model, found)
    compare(model, ours, data, monkeypatch)
    full.config.get_text_config().sliding_window = 4096
    assert abs(loss_and_gradients(full, data[0])[0] - loss_and_gradients(model, data[0])[0]) > 1e-4  # the windows do something


def test_who_keeps_masks_is_told(checkpoint):
    def told(family="llava", dtype=torch.bfloat16, on_gpu=True, **changes) -> str:
        config = AutoConfig.from_pretrained(checkpoint(family))
        for name, value in changes.items():
            setattr(config.get_text_config(), name, value)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        return needs_masks(model, FAMILIES[config.model_type], on_gpu, dtype)

    assert told() == told(on_gpu=False, dtype=torch.float32) == told(head_dim=32) == ""
    assert told(dtype=torch.float32) == "flash-attention takes no float32"
    assert told(head_dim=20) == "flash-attention takes no heads of 20 numbers" and "264" in told(head_dim=264)
    assert told(attention_dropout=0.1, on_gpu=False) == "attention_dropout=0.1"
    assert told("gemma3", attn_logit_softcapping=50.0).startswith("the tokens of a picture of 'gemma3' see one another")
    assert "caps its scores at 50.0" in told(attn_logit_softcapping=50.0)
    assert told("qwen3_5") == "rows of 'qwen3_5' cannot be split into samples"


@pytest.mark.parametrize(
    ("wanted", "packs", "on_gpu", "chosen"),
    [
        ("auto", True, True, True),
        ("auto", False, True, False),
        ("auto", True, False, False),
        ("sdpa", True, True, False),
        ("varlen", False, False, True),
    ],
)
def test_when_it_is_chosen(wanted, packs, on_gpu, chosen, checkpoint):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(checkpoint("llava")))
    told = attend_by_lengths(model, FAMILIES["llava"], wanted, packs=packs, on_gpu=on_gpu, dtype=torch.bfloat16)
    assert told == (BY_LENGTHS if chosen else "") and hasattr(model, "sample_lengths") == chosen


@pytest.mark.parametrize(("family", "counted"), [("qwen2_5_vl", True), ("gemma3", False)])
def test_a_plan_counts_no_mask_where_none_is_made(family, counted, checkpoint):
    """Of packed rows on a GPU: the same operation as on the card, less kept and moved, and nobody waits for positions."""
    from tests.planning.test_count import config_of

    path = checkpoint(family)
    encoder = Encoder(load_processor(ModelConfig(name=path), path), 4096)
    found = [encoder.encode(talk(str(number), sizes, "red and blue")) for number, sizes in enumerate(SIZES)]
    hf_config, row = read_model_config(ModelConfig(name=path), path)
    with torch.device("meta"):
        positions = position_rule(AutoModelForImageTextToText.from_config(hf_config))
    batch = collate_packed([found[:3], found[3:]], 0, positions)
    plans = {}
    for way in ("sdpa", "auto"):
        config = config_of(path, **{"data.packing": "true", "model.attn_implementation": way})
        plans[way] = count_micro_batch(config, hf_config, row, torch.bfloat16, dict(batch))
    names = {operation.name for operation in plans["auto"].work}
    assert ({"_varlen_attn", "_varlen_attn_backward"} <= names) == counted
    masks, ours = ((plan.saved, plan.flops, sum(plan.work.values()), sum(plan.waits.values())) for plan in plans.values())
    assert all(less < more for less, more in zip(ours, masks, strict=True)) if counted else ours == masks


def test_a_run(settings, tmp_path):
    """Training with packed rows on this CPU: the same losses as with masks, and the log says which it was."""
    settings["training"] |= {"steps": 2, "global_batch": 2, "micro_batch": 1}
    settings["data"]["packing"] = True
    losses = {}
    for way in ("sdpa", "varlen"):
        train(load_config(write_config(settings, tmp_path), [f"name={way}", f"model.attn_implementation={way}"]))
        losses[way] = losses_of(tmp_path / "runs" / way)
        log = (tmp_path / "runs" / way / "logs" / "rank-0.log").read_text()
        assert log.count(BY_LENGTHS) == (way == "varlen")
    assert losses["varlen"] == pytest.approx(losses["sdpa"], rel=1e-5) and len(losses["sdpa"]) == 2
