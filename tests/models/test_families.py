"""Every family through the same steps: batches, gradients, pictures that count, overfitting, generating, saving."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.errors import ModelError
from vlm_dist.families import FAMILIES
from vlm_dist.models.adapters import put_on
from vlm_dist.models.checkpointing import checkpoint_gradients
from vlm_dist.models.experts import expert_modules
from vlm_dist.models.generate import generate
from vlm_dist.models.introspect import family_of
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.models.loss import summed_loss

CPU = torch.device("cpu")


def user(text, images=1):
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def picture(colour, size=(40, 30)):
    return Image.new("RGB", size, colour)


SAMPLES = [
    Sample("a", "s", [user("What colour?"), assistant("red")], [picture("red")]),
    Sample(
        "b", "s", [user("Where is the cross?"), assistant("top left"), user("How many?", 0), assistant("two")], [picture("blue", (90, 40))]
    ),
    Sample("c", "s", [user("Which?", 2), assistant("a blue square")], [picture("green"), picture("yellow", (30, 60))]),
    Sample("d", "s", [user("What shape?"), assistant("circle")], [picture("white", (64, 64))]),
]
TEXT_ONLY = Sample("t", "s", [user("Describe.", 0), assistant("one triangle")], [])


@pytest.fixture
def parts(any_checkpoint):
    """A trainable QLoRA model and its encoder."""
    model, processor, family = load_model(ModelConfig(name=any_checkpoint), any_checkpoint, CPU)
    torch.manual_seed(0)
    projector = "frozen" if family.model_type == "gemma3" else "lora"  # Gemma 3's is one bare matrix
    return add_lora(model, family, LoraConfig(r=16, alpha=16, projector=projector)).train(), Encoder(processor, 1024)


def batch(encoder, samples):
    return collate([encoder.encode(sample) for sample in samples], encoder.processor.tokenizer.pad_token_id)


def test_every_row_has_a_builder(checkpoint):
    import json
    from pathlib import Path

    from vlm_dist.testing import tiny_families

    built = {json.loads((Path(checkpoint(name)) / "config.json").read_text())["model_type"] for name in tiny_families()}
    assert built == set(FAMILIES)


def test_a_batch_is_the_sum_of_its_samples(parts):
    """Sizes, aspect ratios, numbers of pictures and turns differ; a row without a picture stands among them."""
    model, encoder = parts
    samples = [*SAMPLES, TEXT_ONLY]
    if model.config.model_type == "mllama":
        # its tokens before a picture attend to every picture slot of the batch, blank ones too (transformers 5.23): equal numbers only
        samples = [sample for sample in SAMPLES if len(sample.images) == 1]
    with torch.no_grad():
        together = summed_loss(model, batch(encoder, samples))
        alone = sum(summed_loss(model, batch(encoder, [sample])) for sample in samples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_every_adapter_learns_and_the_picture_counts(parts):
    model, encoder = parts
    for name, parameter in model.named_parameters():  # lora_B starts at zero, which hides lora_A's gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss = summed_loss(model, batch(encoder, SAMPLES))
    loss.backward()
    starved = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert starved == []
    with torch.no_grad():
        other = summed_loss(model, batch(encoder, [Sample("a", "s", SAMPLES[0].messages, [picture("black")])]))
        first = summed_loss(model, batch(encoder, SAMPLES[:1]))
    assert abs(other - first) > 1e-6


def test_gradient_checkpointing_changes_no_gradient(parts):
    """In all layers, and in the first of the language model and all of the vision tower, which keeps more in memory."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model, encoder = parts
    data = batch(encoder, SAMPLES)
    found, kept = [], []
    vision = any(isinstance(m, GradientCheckpointingLayer) for n, m in model.named_modules() if family_of(model).vision in n)
    if not vision:
        with pytest.raises(ModelError, match="no layers there"):
            checkpoint_gradients(model, family_of(model), {"vision": True})
        model.gradient_checkpointing_disable()
    for wanted in (False, {"language": 1, "vision": vision}, True):
        checkpoint_gradients(model, family_of(model), wanted)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.nbytes) or t, lambda t: t):
            loss = summed_loss(model, data)
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        kept.append(sum(saved))
        model.zero_grad()
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[2][name], gradient, rtol=1e-4, atol=1e-5)
    several = len([m for n, m in model.get_decoder().named_modules() if isinstance(m, GradientCheckpointingLayer)]) > 1
    assert kept[0] > kept[1] >= kept[2] and (kept[1] > kept[2] or not several)


def test_four_samples_are_overfitted(parts):
    """30 steps: the loss falls by 90 %."""
    model, encoder = parts
    data = batch(encoder, SAMPLES)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, betas=(0.9, 0.95))
    losses = []
    for step in range(30):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (step + 1) / 5)
        loss = summed_loss(model, data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses) < 0.1 * losses[0], losses


def test_left_padded_prompts_give_the_answers_of_single_ones(parts):
    model, encoder = parts
    prompts = [encoder.encode_prompt(sample.messages[:1], sample.images) for sample in SAMPLES]
    pad = encoder.processor.tokenizer.pad_token_id
    together = generate(model, encoder.processor, collate(prompts, pad, "left"), 5)
    alone = [generate(model, encoder.processor, collate([prompt], pad, "left"), 5)[0] for prompt in prompts]
    assert together == alone


def test_a_saved_adapter_gives_the_same_logits(parts, any_checkpoint, tmp_path):
    from peft import PeftModel

    model, encoder = parts
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    base, _, _ = load_model(ModelConfig(name=any_checkpoint), any_checkpoint, CPU)
    # plain PEFT takes experts in 16 bit only (test_experts.py); packed ones need our wrapper
    again = (put_on(base, tmp_path) if expert_modules(base) else PeftModel.from_pretrained(base, str(tmp_path))).train()
    data = batch(encoder, SAMPLES[:2])
    with torch.no_grad():
        torch.testing.assert_close(summed_loss(again, data), summed_loss(model, data))
