"""What is worked out ahead changes nothing but when: losses and gradients with it are those without, for every family."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_packing import loaded, samples  # noqa: F401
from vlm_dist.data.collate import collate, collate_packed
from vlm_dist.models import ahead as of_ahead
from vlm_dist.models.ahead import ON_HOST, ahead_rule, placed, stays_on_host
from vlm_dist.models.introspect import family_of
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.patching import patch_model
from vlm_dist.models.positions import position_rule

CPU = torch.device("cpu")


def loss_and_gradients(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = summed_loss(model, batch)
    loss.sum().backward()
    return float(loss.detach().sum()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def batches(model, samples) -> list[dict]:  # noqa: F811
    pad = model.generation_config.pad_token_id
    found = [collate(samples, pad), collate(samples[:1], pad)]
    return [*found, collate_packed([samples[:3], samples[3:]], pad, position_rule(model))] if family_of(model).packs else found


@pytest.mark.parametrize("kernels", ["off", "all"])
def test_numbers_stay(loaded, samples, kernels):  # noqa: F811
    model, _ = loaded
    patch_model(model, kernels)
    rule = ahead_rule(model)
    for batch in batches(model, samples):
        loss, expected = loss_and_gradients(model, batch)
        known = placed(rule(batch), CPU)
        assert {"supervised_rows"} <= known.keys() - batch.keys()
        again, found = loss_and_gradients(model, known)
        assert again == pytest.approx(loss, rel=1e-6) and found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_towers_that_take_sizes(loaded, samples, monkeypatch):  # noqa: F811
    """The table says so of every tower that asks for nothing else, and none works anything out by itself then."""
    model, _ = loaded
    batch = collate(samples, model.generation_config.pad_token_id)
    if "image_grid_thw" not in batch:
        pytest.skip("its pictures have one size, or another way to say it")
    if not family_of(model).tower_takes_sizes:
        assert model.config.model_type.startswith("glm4v")  # its embeddings need the sizes on the device
        return
    known = ahead_rule(model)(batch)
    for name in ("get_vision_cu_seqlens", "get_vision_position_ids", "get_vision_window_index"):
        original = getattr(of_ahead.vision_utils, name)

        def refuse(*arguments, original=original, kwargs=None, **options):
            before = set(kwargs or ())
            found = original(*arguments, kwargs=kwargs, **options)
            assert before - set(kwargs or ()), "worked out in the model"
            return found

        monkeypatch.setattr(of_ahead.vision_utils, name, refuse)
        module = __import__(type(model).__module__, fromlist=["x"])
        if hasattr(module, name):
            monkeypatch.setattr(module, name, refuse)
    assert float(summed_loss(model, known).detach()) > 0


def test_a_wrong_number_of_picture_tokens_is_still_said(loaded, samples):  # noqa: F811
    model, _ = loaded
    if not patch_model(model, "all").counts["picture_places"]:
        pytest.skip("keeps its own way")
    batch = ahead_rule(model)(collate(samples[:1], model.generation_config.pad_token_id))
    wrong = (batch["input_ids"][0] == model.config.image_token_id).nonzero()[0]
    batch["input_ids"][0, wrong] = model.config.image_token_id + 1
    batch["picture_tokens"] = batch["picture_tokens"] - 1
    with pytest.raises(ValueError, match="do not match"):
        summed_loss(model, batch)


def test_what_stays_on_the_host():
    batch = {"input_ids": torch.ones(1, 2), "image_cu_seqlens": torch.ones(3), "image_grid_thw": torch.ones(1, 3), "image_max_seqlen": 4}
    assert not stays_on_host("input_ids", batch) and stays_on_host("image_grid_thw", batch)
    assert not stays_on_host("image_cu_seqlens", batch)  # flash-attention reads it on the card
    del batch["image_max_seqlen"]
    assert stays_on_host("image_cu_seqlens", batch) and "labels" not in ON_HOST
    there = placed({**batch, "image_max_seqlen": 4}, torch.device("meta"))
    assert there["input_ids"].is_meta and there["image_cu_seqlens"].is_meta and not there["image_grid_thw"].is_meta
    assert there["image_max_seqlen"] == 4
