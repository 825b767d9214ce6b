"""What held-out answers cost a merged model, and whose rounding it is."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image, ImageDraw

from vlm_dist.config import DataConfig, LoraConfig, ModelConfig
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.models.comparison import Observed, bits_a_token, compare
from vlm_dist.models.export import export_merged
from vlm_dist.models.generate import encode_chat, generate
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.models.record import probe_inputs

CPU = torch.device("cpu")


def picture(number: int) -> Image.Image:
    image = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(image).rectangle((number % 20, 4, 12 + number % 20, 28), fill=(37 * number % 255, 90 * number % 255, 200))
    return image


@pytest.fixture
def adapted(llava, tmp_path):
    """(base's folder, model with adapters, processor); the base's projector holds large weights that cancel each other, which 16 bit
    cannot."""
    model, processor, _ = load_model(ModelConfig(name=llava, load_in_4bit=False), llava, CPU)
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    with torch.no_grad():
        for layer in (first.weight, first.bias):
            layer[1::2] = layer[0::2]
        second.weight[:, 0::2] += 256.0
        second.weight[:, 1::2] -= 256.0
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    model, processor, family = load_model(ModelConfig(name=base, load_in_4bit=False), base, CPU)
    torch.manual_seed(0)
    return base, add_lora(model, family, LoraConfig(r=2, vision=False)).eval(), processor


def answers_of(model, processor) -> list[dict]:
    """What the model itself says of pictures, as if it were the truth: that it says so it knows well."""
    found = []
    for number in range(4):
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
        said = generate(model, processor, encode_chat(processor, asked, [picture(number)]), 6)[0]
        turns = [*asked, {"role": "assistant", "content": [{"type": "text", "text": said or "red"}]}]
        encoded = Encoder.of(processor, DataConfig(train=["x"])).encode(Sample(str(number), "x", turns, [picture(number)]))
        found.append(collate([encoded], processor.tokenizer.pad_token_id))
    return found


def test_rounding_that_costs_is_told_by_its_part(adapted, tmp_path):
    """Merged in bfloat16 the projector's picture is lost: said so, with the part and what to do; in float32 nothing is."""
    base, model, processor = adapted
    answers = answers_of(model, processor)
    config = ModelConfig(name=base, load_in_4bit=False)
    rounded = export_merged(model, processor, config, tmp_path / "rounded", answers=answers)
    assert rounded.is_worse and rounded.bits_merged > rounded.bits_trained + 0.1, rounded
    assert rounded.bits_float32 == pytest.approx(rounded.bits_trained, abs=1e-3)
    costs = rounded.rounding_bits
    assert costs["projector"] > 0.1 > max(abs(costs["language"]), abs(costs["vision"])), costs
    words = str(rounded)
    assert "WORSE than what was trained: rounding to bfloat16 does it" in words and "rounded alone: the projector +" in words
    assert words.endswith("export with --dtype float32")
    assert json.loads((tmp_path / "rounded" / "merge.json").read_text())["rounding_bits"] == costs
    whole = export_merged(model, processor, config, tmp_path / "whole", answers=answers, dtype="float32")
    assert not whole.is_worse and whole.dtype == "float32" and whole.bits_merged == pytest.approx(whole.bits_trained, abs=1e-3)
    assert "WORSE" not in str(whole)
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size > 1.9 * (tmp_path / "rounded" / "model.safetensors").stat().st_size


def test_bits_are_those_of_the_answers(adapted):
    """Against the sum over the tokens, one by one."""
    _, model, processor = adapted
    batch = answers_of(model, processor)[0]
    with torch.no_grad():
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits[0, :-1].log_softmax(-1)
    labels = batch["labels"][0, 1:]
    expected = (
        -sum(float(row[label]) for row, label in zip(logits, labels, strict=True) if label != -100) / (labels != -100).sum() / math.log(2)
    )
    assert bits_a_token(model, [batch]) == pytest.approx(float(expected), rel=1e-5)
    assert bits_a_token(model, []) is None


def test_a_verdict_without_held_out_answers():
    """The next token's distribution tells: far logits of what nobody says do not count, near ones of what is said do."""
    ours = torch.full((50,), -30.0)
    ours[:2] = torch.tensor([2.0, 1.9])
    harmless, harmful = ours.clone(), ours.clone()
    harmless[5:] += 4.0
    harmful[:2] = torch.tensor([-4.0, 4.0])
    one, other = (
        compare("original", "bfloat16", Observed([ours], ["a"], None), Observed([theirs], ["b"], None)) for theirs in (harmless, harmful)
    )
    assert one.largest_logit_difference == 4.0 and not one.is_worse
    assert other.is_worse and "try --onto dequantised" in str(other)
    assert len(probe_inputs(None)) == 2
