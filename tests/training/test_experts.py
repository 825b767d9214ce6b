"""The balance loss is transformers' own; experts have a learning rate of their own; the load is counted in the forward pass alone."""

from __future__ import annotations

import pytest
import torch

from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.config_load import parse_config
from vlm_dist.distributed import Ranks
from vlm_dist.errors import ModelError
from vlm_dist.models.checkpointing import checkpoint_gradients
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.training.experts import ExpertWatch, balance_loss
from vlm_dist.training.optim import build_optimizer

CPU = torch.device("cpu")
ALONE = Ranks(0, 0, 1, CPU)
YAML = "{name: x, model: {dtype: float32}, data: {train: x}, training: {steps: 1}}"


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_is_that_of_transformers(masked):
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    torch.manual_seed(0)
    logits = [torch.randn(24, 8) for _ in range(3)]
    mask = (torch.arange(24).view(2, 12) % 12 < 7).long() if masked else None
    expected = load_balancing_loss_func(tuple(logits), 8, 2, mask)
    torch.testing.assert_close(balance_loss(logits, 2, mask), expected)


def test_load_rates_and_what_cannot_be(checkpoint, llava):
    name = checkpoint("qwen3_vl_moe")
    config = parse_config(YAML, [f"model.name={name}", "lora.router=full", "optim.lr=1e-3", "optim.lr_experts=1e-4"])
    model, _, family = load_model(ModelConfig(name=name), name, CPU)
    model = add_lora(model, family, LoraConfig(r=4, router="full")).train()
    checkpoint_gradients(model, family, True)
    scales = {
        group["lr_scale"]: sum(p.numel() for p in group["params"]) for group in build_optimizer(model, config.optim, family).param_groups
    }
    of_experts = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".experts." in n)
    assert scales == {0.1: of_experts, 1.0: sum(p.numel() for p in model.parameters() if p.requires_grad) - of_experts}

    watch, ids = ExpertWatch(model, config), torch.randint(10, 100, (2, 15))
    with watch.forward():
        loss = model(input_ids=ids, use_cache=False).logits.square().mean()
    balance = watch.balance({"labels": ids, "attention_mask": torch.ones_like(ids)})
    (loss + balance).backward()  # computes the layers again, and must not count them twice
    assert [int(module.load.sum()) for module in watch.modules] == [2 * 15 * 2] * 3
    found = watch.metrics(ALONE, 28)["experts"]
    assert (
        1 / 8 <= found["busiest"] <= 1 / 2
        and found["of"] == 24
        and found["aux_loss"] == pytest.approx(float(balance) / 28 / 0.001, rel=1e-3)
    )
    assert watch.metrics(ALONE, 28) == {}

    dense, _, _ = load_model(ModelConfig(name=llava), llava, CPU)
    assert ExpertWatch(dense, config).metrics(ALONE, 28) == {}
    with pytest.raises(ModelError, match=r"training.router_aux_loss: this model has no router"):
        ExpertWatch(dense, parse_config(YAML, [f"model.name={llava}", "training.router_aux_loss=0.01"]))
