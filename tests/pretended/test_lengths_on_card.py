"""Packed rows on a card that is not there: attention is by the lengths of samples, with what flash-attention asks of its arguments."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_ahead import loss_and_gradients
from tests.models.test_packing import SIZES, talk
from tests.pretended.card import CARD, pretended_card
from tests.pretended.launches import pretended_launches
from tests.pretended.stepped import one_step
from vlm_dist.config import ModelConfig
from vlm_dist.data.collate import collate, collate_packed
from vlm_dist.data.encode import Encoder
from vlm_dist.models import patching_lengths
from vlm_dist.models.ahead import ahead_rule, placed
from vlm_dist.models.introspect import family_of
from vlm_dist.models.patching_lengths import attend_by_lengths
from vlm_dist.models.patching_vision import attend_in_windows
from vlm_dist.models.positions import position_rule
from vlm_dist.models.processor import load_processor


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_losses_and_gradients_are_those_with_masks(name, checkpoint):
    """In bfloat16: within what two orders of summation are apart."""
    from transformers import AutoModelForImageTextToText

    path = checkpoint(name)
    theirs = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    encoder = Encoder(load_processor(ModelConfig(name=path), path), 4096)
    samples = [encoder.encode(talk(str(number), sizes, "red and blue")) for number, sizes in enumerate(SIZES)]
    pad = encoder.processor.tokenizer.pad_token_id
    for batch in (collate_packed([samples[:3], samples[3:]], pad, position_rule(theirs)), collate(samples, pad)):
        loss, expected = loss_and_gradients(theirs, batch)
        with pretended_card():
            ours = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa").to(CARD).train()
            assert attend_by_lengths(ours, family_of(ours), "varlen", packs=True, on_gpu=True, dtype=torch.bfloat16).endswith(
                "without masks"
            )
            ours.gradient_checkpointing_enable({"use_reentrant": False})
            again, found = loss_and_gradients(ours, placed(ahead_rule(ours)(batch), CARD))
            assert all(gradient.device == CARD for gradient in found.values())
            found = {name: gradient.cpu().float() for name, gradient in found.items()}
        assert again == pytest.approx(loss, rel=5e-3) and found.keys() == expected.keys()
        apart = sum(float((found[name] - gradient.float()).square().sum()) for name, gradient in expected.items())
        assert apart < 0.03**2 * sum(float(gradient.float().square().sum()) for gradient in expected.values())


def test_a_card_where_it_is_wrong_or_does_not_run_keeps_masks(monkeypatch):
    """As kernels are compared before they are put in: values and gradients, sample by sample."""
    by_lengths = patching_lengths.on_card

    def refused(*arguments):
        raise RuntimeError("no kernel image is available")

    def wrong(query, *more):
        return by_lengths(query, *more) * 1.1

    with pretended_card():
        for heads, keys in ((4, 2), (2, 2)):
            assert patching_lengths.disagrees_on_card.__wrapped__(torch.bfloat16, heads, keys, 16) == ""
        for broken, reason in ((refused, "does not run here: no kernel image"), (wrong, "gives other numbers here")):
            monkeypatch.setattr(patching_lengths, "on_card", broken)
            assert reason in patching_lengths.disagrees_on_card.__wrapped__(torch.bfloat16, 4, 2, 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl_moe"])
def test_a_step(name, checkpoint):
    """By the calls that training makes: 4 bit, adapters, kernels, each layer computed again."""
    with pretended_card(), pretended_launches() as launches:
        _, model = one_step(checkpoint(name), CARD, launches, dtype="bfloat16", packed=True)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert all(gradient is not None and gradient.device == CARD for gradient in gradients)


@pytest.mark.parametrize("lengths", [[4, 6, 4, 2, 6], [3, 0, 5], [4, 4]])
def test_windows_of_a_vision_tower(lengths):
    """Those of several lengths at once; their number is known to the host, as models/ahead.py hands it over."""
    states = torch.randn((3, 1, 2, sum(lengths), 8), generator=torch.Generator().manual_seed(0)).bfloat16()
    ends = torch.tensor([0, *lengths]).cumsum(0)
    window = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = torch.nn.functional.scaled_dot_product_attention(*states.float(), attn_mask=window[:, None] == window, scale=0.3)
    with pretended_card():
        found, _ = attend_in_windows(None, *states.to(CARD), cu_seq_lens_q=ends, scaling=0.3)
        assert found.device == CARD and (len(set(lengths)) == 1 or ends.windows.starts[0].device == CARD)
        found = found.cpu()
    torch.testing.assert_close(found.float(), expected.transpose(1, 2), rtol=2e-2, atol=2e-2)


def test_lengths_left_on_the_cpu_are_found(llava):
    with pretended_card(), pretended_launches() as launches, pytest.raises(RuntimeError, match="on the same device"):
        one_step(llava, CARD, launches, dtype="bfloat16", packed=True, left_behind="sample_starts")
