"""Several samples in one row: none sees another. Per-sample losses packed equal those of each sample alone, for every family that packs."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vlm_dist.data.collate import collate, collate_packed
from vlm_dist.data.encode import IGNORED, Encoder
from vlm_dist.data.encoded import count_patches
from vlm_dist.data.lengths import Ruler
from vlm_dist.data.samples import Sample
from vlm_dist.models.introspect import family_of
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.patching import patch_model
from vlm_dist.models.positions import position_rule

SIZES = [[(40, 30)], [], [(64, 64)], [(300, 200)], [(33, 77)]]


def talk(key: str, sizes: list[tuple[int, int]], answer: str) -> Sample:
    generator = torch.Generator().manual_seed(len(answer))
    images = []
    for width, height in sizes:
        pixels = torch.randint(0, 255, (height, width, 3), dtype=torch.uint8, generator=generator)
        images.append(Image.fromarray(pixels.numpy()))
    content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": "What colour is the triangle?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return Sample(key, "s.tar", turns, images)


@pytest.fixture
def loaded(any_checkpoint):
    from transformers import AutoModelForImageTextToText

    from vlm_dist.config import ModelConfig
    from vlm_dist.models.processor import load_processor

    model = AutoModelForImageTextToText.from_pretrained(any_checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    return model, Encoder(load_processor(ModelConfig(name=any_checkpoint), any_checkpoint), 4096)


@pytest.fixture
def samples(loaded):
    _, encoder = loaded
    answers = ["red", "a green cross at the top left", "blue and red", "yellow", "a small red circle at the bottom"]
    return [encoder.encode(talk(str(number), sizes, answer)) for number, (sizes, answer) in enumerate(zip(SIZES, answers, strict=True))]


def token_losses(model, batch) -> torch.Tensor:
    """[B, T] loss of each token, 0 where it has no label."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits.float()
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")


def per_sample(losses_T: torch.Tensor, row) -> list[float]:
    """The summed loss of each sample of a row."""
    return [float(part.sum()) for part in torch.split(losses_T[: sum(sample.length for sample in row)], [sample.length for sample in row])]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_is_as_alone(loaded, samples, attention):
    model, _ = loaded
    model.set_attn_implementation(attention)
    if not family_of(model).packs:
        pytest.skip(f"{model.config.model_type} does not pack: its row of the table says so")
    pad = model.generation_config.pad_token_id
    rows = [samples[:3], samples[3:]]
    with torch.no_grad():
        alone = [float(token_losses(model, collate([sample], pad)).sum()) for sample in samples]
        batch = collate_packed(rows, pad, position_rule(model))
        packed = [loss for losses, row in zip(token_losses(model, batch), rows, strict=True) for loss in per_sample(losses, row)]
    assert min(alone) > 0.1
    assert packed == pytest.approx(alone, rel=1e-5)


def test_gradients_packed_are_as_padded(loaded, samples):
    model, _ = loaded
    if not family_of(model).packs:
        pytest.skip(f"{model.config.model_type} does not pack: its row of the table says so")
    pad = model.generation_config.pad_token_id
    patch_model(model, "auto")

    def gradients(batches) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        loss = torch.stack([summed_loss(model, batch) for batch in batches]).sum()
        loss.backward()
        return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, expected = gradients([collate([sample], pad) for sample in samples])
    packed_loss, found = gradients([collate_packed([samples[:3], samples[3:]], pad, position_rule(model))])
    assert packed_loss == pytest.approx(loss, rel=1e-5) and found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}")


def test_the_loss_of_each_data_set_in_a_patched_model(loaded, samples):
    """From hidden states, data set by data set, as from the logits of the model as it was."""
    model, _ = loaded
    pad = model.generation_config.pad_token_id
    for number, sample in enumerate(samples):
        sample.inputs["datasets"] = torch.full_like(sample.inputs["input_ids"], number % 2)
    batch = collate(samples, pad) | {"num_datasets": torch.tensor(2)}
    with torch.no_grad():
        expected = summed_loss(model, batch)
        patches = patch_model(model, "all")
        found = summed_loss(model, batch)
    assert patches.counts.get("linear_cross_entropy") and found.shape == (2,)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_families_that_do_not_pack_leak(loaded, samples):
    """The table keeps no family from packing without a reason."""
    model, _ = loaded
    if family_of(model).packs:
        pytest.skip("it packs; see above")
    pad = model.generation_config.pad_token_id
    row = [samples[3], samples[4]]
    with torch.no_grad():
        alone = [float(token_losses(model, collate([sample], pad)).sum()) for sample in row]
        try:
            packed = per_sample(token_losses(model, collate_packed([row], pad, position_rule(model)))[0], row)
        except (RuntimeError, ValueError, IndexError):
            return  # it cannot even be computed
    assert packed != pytest.approx(alone, rel=1e-6)


def test_lengths_are_known_before_decoding(loaded):
    _, encoder = loaded
    ruler = Ruler(encoder)
    for sizes in ([(40, 30)], [(1000, 80)], [(500, 500)], [(300, 200), (64, 64)], [(33, 77), (20, 20), (500, 90)], []):
        sample = talk("k", sizes, "red and blue")
        if len(sizes) > 1 and type(encoder.processor).__name__ == "MiniVLMProcessor":
            continue  # takes one picture
        encoded = encoder.encode(sample)
        length = ruler.measure(sample.messages, sizes)
        assert length.tokens == encoded.length
        assert length.patches == pytest.approx(count_patches(encoded.inputs), rel=0.5, abs=40)
