"""Settings of a processor: those that change what it does are taken, all others refused by name."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image

from vlm_dist.config import ModelConfig
from vlm_dist.errors import ModelError
from vlm_dist.models.load import load_model
from vlm_dist.models.processor import load_processor
from vlm_dist.models.processor_settings import known_settings

PIXELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


def load(name: str, **settings):
    return load_processor(ModelConfig(name=name, processor=settings), name)


def test_what_has_no_effect_is_refused(any_checkpoint):
    family = any_checkpoint.rsplit("/", 1)[1]
    for setting in ("max_pixel", "maximum_pixels", "imgsize", "return_tensors", *([] if family in PIXELS else ["max_pixels"])):
        with pytest.raises(ModelError, match=rf"model\.processor: '{setting}' has no effect on '.*' \(\w+ImageProcessor\)") as problem:
            load(any_checkpoint, **{setting: 100})
        assert all(name in str(problem.value) for name in known_settings(load(any_checkpoint)))


@pytest.mark.parametrize("family", PIXELS)
def test_what_is_taken_changes_what_it_does(checkpoint, family):
    picture, text = Image.effect_noise((400, 300), 90).convert("RGB"), "<|vision_start|><|image_pad|><|vision_end|>"

    def tokens(pixels: int) -> int:
        return len(load(checkpoint(family), max_pixels=pixels)(text=[text], images=[[picture]])["input_ids"][0])

    small, large = tokens(100 * 100), tokens(400 * 300)
    assert small < large / 4
    with pytest.raises(ModelError, match="did you mean 'max_pixels'"):
        load(checkpoint(family), max_pixel=1)


def test_sizes_of_others(checkpoint):
    assert load(checkpoint("llava"), size={"height": 64, "width": 64}).image_processor.size["height"] == 64
    assert load(checkpoint("gemma3"), do_pan_and_scan=True).image_processor.do_pan_and_scan
    with pytest.raises(ModelError, match="'size' has no effect"):
        load(checkpoint("gemma4"), size={"height": 64, "width": 64})


def test_tokens_without_a_row_of_the_embedding(checkpoint, tmp_path, caplog):
    from transformers import AutoProcessor

    shutil.copytree(checkpoint("llava"), tmp_path / "more")
    processor = AutoProcessor.from_pretrained(tmp_path / "more")
    tokens = len(processor.tokenizer)
    processor.tokenizer.add_tokens([f"<more{number}>" for number in range(60)])
    processor.save_pretrained(tmp_path / "more")
    load_model(ModelConfig(name=str(tmp_path / "more")), str(tmp_path / "more"), torch.device("cpu"))
    assert "samples with such tokens cannot be trained on" in caplog.text
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<last>"]}, replace_extra_special_tokens=False)
    processor.save_pretrained(tmp_path / "more")
    words = rf"has {tokens + 61} tokens, the embedding \d+ rows; '<more\d+>' is number \d+; use the tokenizer"
    with pytest.raises(ModelError, match=words):
        load_model(ModelConfig(name=str(tmp_path / "more")), str(tmp_path / "more"), torch.device("cpu"))
