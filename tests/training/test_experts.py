"""The balance loss is transformers' own; experts have a learning rate of their own; the load is counted in the forward pass alone."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import losses_of, write_config
from vlm_dist import load_config, train
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.config_load import parse_config
from vlm_dist.distributed import Ranks
from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.models.checkpointing import checkpoint_gradients
from vlm_dist.models.going_on import lora_of
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.planning.fits import check_fits
from vlm_dist.planning.gpus import GPUS, Gpu
from vlm_dist.planning.plan import make_plan, open_planner, without_experts
from vlm_dist.training import train as loop
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


def test_load_rates_and_what_cannot_be(checkpoint, llava, caplog):
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

    dense, _, family = load_model(ModelConfig(name=llava), llava, CPU)
    dense_lora = add_lora(dense, family, LoraConfig(r=4, vision=False))
    with caplog.at_level("WARNING"):
        build_optimizer(
            dense_lora, parse_config(YAML, [f"model.name={llava}", "optim.lr_experts=1e-4", "optim.lr_language=1e-3"]).optim, family
        )
    assert [record.getMessage() for record in caplog.records if "optim." in record.getMessage()] == [
        "optim.lr_experts: nothing of it trains here, so it has no effect"
    ]
    dense, _, _ = load_model(ModelConfig(name=llava), llava, CPU)
    assert ExpertWatch(dense, config).metrics(ALONE, 28) == {}
    with pytest.raises(ModelError, match=r"training.router_aux_loss: this model has no router"):
        ExpertWatch(dense, parse_config(YAML, [f"model.name={llava}", "training.router_aux_loss=0.01"]))


@pytest.mark.slow
def test_adapters_on_experts_where_memory_allows(settings, checkpoint, tmp_path, monkeypatch, caplog, capsys):
    """Left off on a card that holds a step without them only; told; and a run goes on with what it began with on a larger card."""
    settings["model"]["name"] = checkpoint("qwen3_vl_moe")
    settings["lora"]["r_experts"] = 64
    path = write_config(settings, tmp_path)
    with open_planner(load_config(path), GPUS["h100"], 1) as planner:
        totals = [
            make_plan(replace(planner, config=config), others=False)["own"]["total"]
            for config in (planner.config, without_experts(planner.config))
        ]
        assert totals[0] > totals[1] + 1e6
        planner.gpu = Gpu("between", sum(totals) // 2, 1e12, 1e11, 1e10)
        plan = make_plan(planner, others=False)
        assert plan["own"]["total"] == totals[1] and plan["experts"]["chosen"] == "off"
        words = (
            r"lora\.experts=auto: off, by memory \(with adapters on experts a step needs 0\.\d GB, without 0\.\d GB; between has 0\.\d GB\)"
        )
        assert re.fullmatch(words, plan["experts"]["why"])
        assert make_plan(replace(planner, gpu=GPUS["h100"]), others=False)["experts"] == {"chosen": "auto", "why": ""}
        planner.gpu = replace(planner.gpu, memory=1000)
        assert make_plan(planner, others=False)["experts"]["why"] == ""  # nothing would help

    def adapted() -> bool:
        run = tmp_path / "runs" / "tiny"
        return any(".experts." in name for name in load_file(run / "adapter" / "adapter_model.safetensors"))

    small = Gpu("between", sum(totals) // 2, 1e12, 1e11, 1e10)
    monkeypatch.setattr(loop, "check_fits", partial(check_fits, gpu=small))
    train(load_config(path))
    assert not adapted() and "lora.experts=auto: off, by memory" in caplog.text
    monkeypatch.setattr(loop, "check_fits", check_fits)  # no card, no limit
    run = tmp_path / "runs" / "tiny"
    expected = losses_of(run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "summary.json").unlink()
    train(load_config(path))
    assert losses_of(run) == pytest.approx(expected, rel=1e-5) and not adapted()
    train(load_config(path, ["name=other"]))
    assert "lora.experts=auto: lora of rank 64 on each" in capsys.readouterr().out


def test_going_on_takes_what_an_adapter_says_of_experts_and_routers(checkpoint, tmp_path):
    """Their rank, scale and router; the rank of the language model is not lost in that of all experts together."""
    name = checkpoint("qwen3_vl_moe")
    form = {"r": 8, "r_language": 2, "alpha_language": 4, "r_experts": 3, "alpha_experts": 9, "router": "full"}
    model, _, family = load_model(ModelConfig(name=name), name, CPU, lora=LoraConfig(**form))
    add_lora(model, family, LoraConfig(**form)).save_pretrained(tmp_path)
    found = lora_of(tmp_path, family, LoraConfig(experts="auto", router="full"))
    assert {key: getattr(found, key) for key in form} == form
    assert found.experts == "lora" and found.modules_to_save == []
    assert lora_of(tmp_path, family, found) == found
    for said, reason in (
        ({"r_experts": 4}, r"lora.r_experts: 4, but the adapter in .* has 3, and"),
        ({"experts": "off"}, r"lora.experts: off, but the adapter in .* has lora, and"),
        ({"router": "frozen"}, r"lora.router: frozen, but the adapter in .* has full, and"),
        ({"dropout": 0.1}, r"lora.dropout: 0.1, but the adapter in .* is on experts too, which have none; set it to 0"),
    ):
        with pytest.raises(ConfigError, match=reason):
            lora_of(tmp_path, family, LoraConfig(**said))


def test_balance_loss_of_a_router_that_gives_out_probabilities(checkpoint):
    """Gemma 4's: the loss and its gradient are those of its scores, not of a softmax of a softmax."""
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    name = checkpoint("gemma4_moe")
    config = parse_config(YAML, [f"model.name={name}", "training.router_aux_loss=1"])
    model, _, _ = load_model(ModelConfig(name=name, load_in_4bit=False), name, CPU)
    scores: list[torch.Tensor] = []
    weights = [module.proj.weight for path, module in model.named_modules() if path.endswith(".router")]
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.endswith(".router"):
                module.proj.weight.mul_(100)  # far from even
                module.proj.register_forward_hook(lambda _, __, output: scores.append(output))
    watch, ids = ExpertWatch(model, config), torch.randint(10, 100, (2, 15))
    with watch.forward():
        model.eval()(input_ids=ids, use_cache=False)
    found = watch.balance({"labels": ids, "attention_mask": torch.ones_like(ids)}) / 28
    expected: Any = load_balancing_loss_func(tuple(scores), scores[0].shape[-1], watch.top_k)
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(loss, weights, retain_graph=True) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gemma4_moe"])
def test_the_balance_is_of_all_rows_with_kernels_too(checkpoint, family):
    """A last layer that computes supervised rows only would choose experts for these alone."""
    from vlm_dist.models.loss import summed_loss
    from vlm_dist.models.patching import patch_model

    name, found = checkpoint(family), []
    ids = torch.randint(10, 100, (2, 15), generator=torch.Generator().manual_seed(0))
    labels = ids.where(torch.arange(15) > 11, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    config = parse_config(YAML, [f"model.name={name}", "training.router_aux_loss=0.5"])
    for kernels in ("off", "auto"):
        model, _, _ = load_model(ModelConfig(name=name, load_in_4bit=False), name, CPU)
        patches = patch_model(model, kernels, balances=True)
        watch = ExpertWatch(model, config)
        with watch.forward():
            loss = summed_loss(model, batch)
        found.append((float(loss.detach()), float(watch.balance(batch))))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert patches.counts["linear_cross_entropy"] and "router_aux_loss is of all rows" in patches.kept["supervised_rows"]
