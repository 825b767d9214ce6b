"""Data that a model has learnt by heart is scored as such, whatever its chat template writes around the words."""

from __future__ import annotations

import pytest
import torch

from scripts.families_table import overfit, samples
from scripts.templates_table import RELEASED, template
from vlm_dist import distributed
from vlm_dist.config import EvaluationConfig, LoraConfig, ModelConfig
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.models.loss import summed_loss
from vlm_dist.scoring.evaluate import evaluate


def learnt(checkpoint: str, name: str, reasoning: bool):
    """(model, encoder, samples) after 60 steps on four samples, or 30 more where the last of them threw one out again."""
    model, processor, family = load_model(ModelConfig(name=checkpoint), checkpoint, torch.device("cpu"))
    processor.chat_template = template(name)
    encoder, data = Encoder(processor, 1024), samples()
    if reasoning:
        for sample in data:
            sample.messages[1]["reasoning_content"] = "I look."
    torch.manual_seed(0)
    adapted = add_lora(model, family, LoraConfig(r=16)).train()
    batch = collate([encoder.encode(sample) for sample in data], processor.tokenizer.pad_token_id)
    for times in range(1, 6):
        overfit(adapted, batch)
        with torch.no_grad():
            if times > 1 and summed_loss(adapted, batch) < 1:
                break
    return adapted, encoder, data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "reasoning"),
    [
        ("qwen3_5", "qwen3_5_think", False),
        ("qwen3_5", "qwen3_5_think", True),
        ("qwen3_5", "qwen3_5_nothink", True),
        ("llava_next", "llava_next", False),
    ],
)
def test_on_released_templates(checkpoint, family, name, reasoning):
    """Of families whose tiny tokenizer has the template's end-of-turn for a token: others would not stop."""
    assert family in RELEASED
    model, encoder, data = learnt(checkpoint(family), name, reasoning)
    found = evaluate(model, encoder, data, EvaluationConfig(batch_size=2, max_new_tokens=48), distributed.alone())
    assert not found.refused and found.scores["exact_match"] == 1.0, [(row["answer"], row["truth"]) for row in found.rows]
