"""gradient_checkpointing: offload, on a card that is not there: what layers keep is in host memory, and the numbers are the same."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_families import SAMPLES, TEXT_ONLY, batch
from tests.pretended.card import CARD, on_card, pretended_card
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.data.encode import Encoder
from vlm_dist.models import offloading
from vlm_dist.models.checkpointing import checkpoint_gradients
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.models.loss import summed_loss


def gradients(path: str, wanted: bool | str, device: torch.device, rounds: int = 2) -> list[torch.Tensor]:
    """Of adapters, after micro-batches whose gradients add up."""
    model, processor, family = load_model(ModelConfig(name=path, dtype="float32", load_in_4bit=False), path, device)
    torch.manual_seed(0)
    model = add_lora(model, family, LoraConfig(r=4)).train()
    checkpoint_gradients(model, family, wanted)
    data = {name: tensor.to(device) for name, tensor in batch(Encoder(processor, 1024), [SAMPLES[1], TEXT_ONLY]).items()}
    for _ in range(rounds):
        summed_loss(model, data).backward()
    return [parameter.grad.detach().cpu() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("family", "unread"), [("llava", 2), ("qwen2_5_vl", 0)])
def test_inputs_are_away_and_numbers_are_the_same(family, unread, checkpoint, monkeypatch):
    """LLaVA does not read what its last vision layer gives: nothing flows back there, in each of the two micro-batches."""
    path = checkpoint(family)
    kept, fetched = [], []
    monkeypatch.setattr(offloading, "LEAST_BYTES", 1)

    class Watched(offloading._Away):
        def __init__(self, tensor, beside, before):
            super().__init__(tensor, beside, before)
            kept.append((on_card(tensor), on_card(self.host)))

        def fetch(self):
            fetched.extend([] if self.fetched is not None else [id(self)])
            super().fetch()
            assert on_card(self.fetched)

    monkeypatch.setattr(offloading, "_Away", Watched)
    with pretended_card():
        expected = gradients(path, True, CARD)
        assert not kept
        found = gradients(path, "offload", CARD)
    assert len(kept) - unread == len(fetched) >= 6 and set(kept) == {(True, False)}
    assert len(found) == len(expected) > 8
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_on_a_cpu_nothing_moves(llava):
    found, expected = (gradients(llava, wanted, torch.device("cpu"), 1) for wanted in ("offload", True))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
