"""FastVisionModel's two modes."""

from __future__ import annotations

import pytest
import torch

from vlm_dist import FastVisionModel
from vlm_dist.errors import ModelError


def test_training_and_inference_modes(llava):
    model, _ = FastVisionModel.from_pretrained(llava)
    model = FastVisionModel.get_peft_model(model, r=2, lora_dropout=0.5)
    ids = torch.tensor([[1, 50, 60, 70]])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    trained = FastVisionModel.for_training(model)
    assert trained is model and model.training and model.is_gradient_checkpointing
    assert not model.config.get_text_config().use_cache
    with torch.no_grad():
        noisy = [model(input_ids=ids).logits for _ in range(2)]
        assert not torch.equal(*noisy)
        assert FastVisionModel.for_inference(model) is model
        assert not model.training and not model.is_gradient_checkpointing and model.config.get_text_config().use_cache
        quiet = [model(input_ids=ids).logits for _ in range(2)]
        assert torch.equal(*quiet)
    with pytest.raises(ModelError, match="use_gradient_checkpointing"):
        FastVisionModel.for_training(model, "maybe")
