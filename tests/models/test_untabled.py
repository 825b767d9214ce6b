"""Newcomers of transformers 5 that have no row in the table: read off their modules they train; what stops others is told in a line."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers as hf

from tests.conftest import ROOT, child_environment
from tests.models import untabled
from tests.models.test_families import SAMPLES, TEXT_ONLY, batch
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.families import FAMILIES
from vlm_dist.models.experts import expert_modules
from vlm_dist.models.experts_lora import experts_in_words
from vlm_dist.models.generate import generate
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.patching import patch_model

CPU = torch.device("cpu")
COUNTS_OVER_THE_BATCH = ("hunyuan_vl",)  # an axis of its positions is a picture's number in the whole batch (transformers 5.23)

EXPERTS = {"ernie4_5_vl_moe": 4, "deepseek_ocr2": 2, "kimi_k25": 2, "minimax_m3_vl": 2}
"""Sets of experts; in ERNIE's layers one for text and one for pictures."""
WHOLE_LAST_LAYER = ("ernie4_5_vl_moe", "gemma4_shared", "kimi_k25", "lfm2_vl", "lfm3_vl")
"""Names of its layers are others than q_proj, o_proj and mlp, or later layers read what it makes of the others."""

NAMES = [
    "cohere2_vision",
    pytest.param("deepseek_ocr2", marks=pytest.mark.slow),
    "ernie4_5_vl_moe",
    "fast_vlm",
    "gemma4_shared",
    "granite4_vision",
    "hunyuan_vl",
    "kimi_k25",
    "lfm2_vl",
    "lfm3_vl",
    "minimax_m3_vl",
    "paddleocr_vl",
    "perception_lm",
]


@pytest.mark.parametrize("name", NAMES)
def test_newcomers_train(tmp_path, name):
    assert name not in FAMILIES
    torch.manual_seed(0)
    processor, model = getattr(untabled, name)()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor, family = load_model(ModelConfig(name=str(tmp_path)), str(tmp_path), CPU)
    assert len(expert_modules(model)) == EXPERTS.get(name, 0)
    model = add_lora(model, family, LoraConfig(r=4))
    for parameter in model.parameters():  # lora_B starts at zero, which hides lora_A's gradient
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    encoder, samples = Encoder(processor, 1024), [*SAMPLES, TEXT_ONLY]
    with torch.no_grad():
        together = summed_loss(model.eval(), batch(encoder, samples))
        alone = sum(summed_loss(model, batch(encoder, [sample])) for sample in samples)
    difference = float((together - alone).abs())
    assert (1e-4 < difference < 1) if name in COUNTS_OVER_THE_BATCH else difference < 1e-3
    patches = patch_model(model, "auto")
    assert ("supervised_rows" in patches.kept) == (name in WHOLE_LAST_LAYER)
    with torch.no_grad():
        torch.testing.assert_close(summed_loss(model, batch(encoder, samples)), together, rtol=1e-5, atol=1e-3)
    summed_loss(model.train(), batch(encoder, samples)).backward()
    starved = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert all("layers.2.mlp.vision_moe." in name for name in starved)  # what a picture's tokens become in the last layer nothing reads
    prompt = collate([encoder.encode_prompt(SAMPLES[0].messages[:1], SAMPLES[0].images)], processor.tokenizer.pad_token_id, "left")
    assert isinstance(generate(model, processor, prompt, 3)[0], str)


WITHOUT_TIMM = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "timm" else found(name, *more)
import transformers
from vlm_dist.config import ModelConfig
from vlm_dist.models.load import read_model_config
folder, name = sys.argv[1:]
getattr(transformers, name)().save_pretrained(folder)
read_model_config(ModelConfig(name=folder), folder)
"""


@pytest.mark.parametrize("name", ["FastVlmConfig", "PerceptionLMConfig"])
def test_towers_of_timm_are_told_where_timm_is_not(tmp_path, name):
    """One line; without it, a traceback of transformers."""
    command = [sys.executable, "-c", WITHOUT_TIMM, str(tmp_path), name]
    done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=300, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vlm_dist.errors.ModelError: ")
    assert (
        f"architecture '{getattr(hf, name).model_type}' cannot be built from its config.json here: " in last and "pip install timm" in last
    )


def test_experts_of_llama4_stay_as_they_are_and_this_is_told():
    """They have no implementation by name in transformers 5.23."""
    text = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "vocab_size": 99}
    vision = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    with torch.device("meta"):
        model = hf.Llama4ForConditionalGeneration(hf.Llama4Config(text_config=text, vision_config=vision))
    words = experts_in_words(model, LoraConfig())
    assert words.startswith("experts: those of this architecture cannot be read (language_model.model.layers.0.feed_forward.experts.")
    assert words.endswith("they stay in 16 bit and have no adapter")
