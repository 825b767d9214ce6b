"""The mini VLM: the sizes and sums of the notebook that it comes from, any encoder with any language model, and a whole run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from PIL import Image

from tests.conftest import losses_of, run_command
from vlm_dist.errors import ModelError
from vlm_dist.families import FAMILIES
from vlm_dist.models.compose import compose
from vlm_dist.models.lora import freeze_sides
from vlm_dist.models.mini_vlm import MiniVLM, MiniVLMConfig, MiniVLMProcessor, VisionProjector

RED = (Image.new("RGB", (50, 40), "red"),)


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_sizes_of_vit_large_and_smollm_360m():
    vision = hf.ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    text = hf.LlamaConfig(
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5, vocab_size=49152,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = MiniVLM(MiniVLMConfig(vision_config=vision, text_config=text, image_token_id=49152))
    assert count(model.vision_encoder.parameters()) == 304_351_232
    assert count(model.projector.parameters()) == 1_908_480
    assert count(model.language_model.parameters()) == 361_821_120
    assert count(model.parameters()) == 668_080_832
    freeze_sides(model, FAMILIES["mini_vlm"], ["vision"])
    assert count(p for p in model.parameters() if p.requires_grad) == 363_729_600


def load(folder) -> tuple[MiniVLM, MiniVLMProcessor]:
    return hf.AutoModelForImageTextToText.from_pretrained(folder).eval(), hf.AutoProcessor.from_pretrained(folder)


def inputs_of(processor, text="This image shows a red circle", pictures=RED):
    return processor(text=["<image>" * len(pictures) + text], images=[list(pictures)], return_tensors="pt")


def perturb(projector):
    """A projector whose output is large enough to be seen in the logits."""
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def test_a_picture_is_197_tokens(vision, language, tmp_path):
    compose(vision("vit224"), language("llama"), tmp_path / "model")
    model, processor = load(tmp_path / "model")
    inputs = inputs_of(processor)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 197
    assert model.encode_image(inputs["pixel_values"]).shape == (1, 197, 64)


@pytest.mark.parametrize("speaks", ["llama", "gemma2"])
def test_the_sum_is_that_of_the_notebook(vision, language, tmp_path, speaks):
    """[projected picture, embedded text] through the language model, labels -100 on the picture."""
    compose(vision("vit"), language(speaks), tmp_path / "model")
    model, processor = load(tmp_path / "model")
    perturb(model.projector)
    inputs = inputs_of(processor)
    ids = inputs["input_ids"]
    is_picture = ids == model.config.image_token_id
    text_ids = ids[~is_picture].unsqueeze(0)
    assert is_picture.sum() == 5 and is_picture[0, :5].all()  # tokens of the picture come first

    features = model.vision_encoder(pixel_values=inputs["pixel_values"]).last_hidden_state
    embeddings = torch.cat([model.projector(features), model.language_model.get_input_embeddings()(text_ids)], dim=1)
    labels = torch.cat([torch.full((1, 5), -100), text_ids], dim=1)
    expected = model.language_model(inputs_embeds=embeddings, attention_mask=torch.ones(1, embeddings.shape[1]), labels=labels)
    found = model(**inputs, labels=ids)  # picture tokens carry labels here: the model itself ignores them
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    hidden = model.base_model(**inputs).last_hidden_state
    if speaks == "llama":
        torch.testing.assert_close(model.get_output_embeddings()(hidden), expected.logits)


def test_the_cache_changes_no_answer(vision, language, tmp_path):
    compose(vision("vit"), language("llama"), tmp_path / "model")
    model, processor = load(tmp_path / "model")
    perturb(model.projector)
    inputs = inputs_of(processor, "This image shows")
    with torch.no_grad():
        ids = inputs["input_ids"]
        for _ in range(8):  # the notebook's loop: everything anew for each token
            ids = torch.cat([ids, model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == processor.tokenizer.eos_token_id:
                break
        for use_cache in (True, False):
            found = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use_cache)
            assert torch.equal(found, ids)


def test_parts_in_hand_make_the_same_model(vision, language, tmp_path):
    """`MiniVLM(vision_encoder=..., ...)` is what `compose` writes; frozen parts stay frozen, and it saves and loads like any other."""
    compose(vision("vit"), language("llama"), tmp_path / "composed", seed=3)
    composed, _ = load(tmp_path / "composed")
    vision_encoder, language_model = hf.ViTModel.from_pretrained(vision("vit")), hf.AutoModelForCausalLM.from_pretrained(language("llama"))
    vision_encoder.requires_grad_(False)
    tokenizer = hf.AutoTokenizer.from_pretrained(language("llama"))
    torch.manual_seed(3)
    parts = {"vision_encoder": vision_encoder, "language_model": language_model, "projector": VisionProjector(64, 64)}
    model = MiniVLM(**parts, tokenizer=tokenizer)
    assert model.projector is parts["projector"] and model.config.image_token_id == composed.config.image_token_id
    expected = composed.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith("model.vision_encoder")
    }
    model.save_pretrained(tmp_path / "saved")
    again = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").state_dict()
    assert expected.keys() == again.keys() and all(torch.equal(expected[name], tensor) for name, tensor in again.items())
    with pytest.raises(ValueError, match="all of vision_encoder, language_model, projector and tokenizer"):
        MiniVLM(vision_encoder=vision_encoder)


@pytest.mark.parametrize(
    ("sees", "speaks", "tokens"), [("vit", "gpt2", 5), ("clip", "llama", 5), ("siglip", "qwen2", 4), ("dinov2", "gemma2", 5)]
)
def test_any_encoder_with_any_language_model(vision, language, tmp_path, sees, speaks, tokens):
    compose(vision(sees), language(speaks), tmp_path / "a", seed=3)
    compose(vision(sees), language(speaks), tmp_path / "b", seed=3)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    model, processor = load(tmp_path / "a")
    inputs = inputs_of(processor, pictures=(Image.new("RGB", (50, 40), "red"), Image.new("L", (9, 90))))
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2 * tokens
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.projector.parameters())
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    original = hf.AutoModelForCausalLM.from_pretrained(language(speaks)).state_dict()
    assert all(torch.equal(original[name], tensor) for name, tensor in model.language_model.state_dict().items())


def test_numbers_of_tokens_must_agree(vision, language, tmp_path):
    compose(vision("vit"), language("llama"), tmp_path / "model")
    model, processor = load(tmp_path / "model")
    inputs = inputs_of(processor)
    with pytest.raises(ValueError, match="4 picture tokens in the text, 5 features"):
        model(input_ids=inputs["input_ids"][:, 1:], pixel_values=inputs["pixel_values"])


def test_parts_that_do_not_fit_say_so(vision, language, tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded by AutoImageProcessor"):
        compose(language("llama"), language("llama"), tmp_path / "model")
    with pytest.raises(ModelError, match="no causal language model"):
        compose(vision("vit"), vision("vit"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_projector_is_the_notebooks():
    kinds = [type(layer) for layer in VisionProjector(8, 4).projection]
    assert kinds == [torch.nn.Linear, torch.nn.GELU, torch.nn.LayerNorm, torch.nn.Linear]


@pytest.mark.slow
def test_the_whole_run(vision, language, tmp_path):
    """configs/mini_vlm_flickr8k.yaml at tiny scale: pack, train with a stop in between, captions before and after, load it back."""
    colours = ["red", "blue", "lime", "yellow", "white", "black"]
    source = tmp_path / "flickr8k"
    (source / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    for number in range(48):
        colour = colours[number % 6]
        Image.new("RGB", (40, 30 + number), colour).save(source / "Images" / f"{number}.jpg")  # no two alike: these go to one side together
        lines += [f"{number}.jpg,{form.format(colour)}" for form in ("a {} picture .",) * 5]
    (source / "captions.txt").write_text("\n".join(lines) + "\n")
    packed = run_command("data", "pack", "--format", "flickr8k", str(source), str(tmp_path / "shards"), "--heldout", "12")
    assert packed.returncode == 0, packed.stderr

    config = "configs/mini_vlm_flickr8k.yaml"
    changes = [
        f"model.mini_vlm.vision={vision('vit')}", f"model.mini_vlm.language={language('llama')}", f"output_dir={tmp_path / 'runs'}",
        f"data.train={tmp_path}/shards/flickr8k-train-*.tar", f"data.heldout={tmp_path}/shards/flickr8k-heldout-*.tar", "optim.lr=3e-3",
        "training.epochs=12", "checkpoint.save_every=20", "checkpoint.keep_last=9",
        "evaluation.samples=12", "log.wandb=disabled", "model.dtype=float32", f"data.cache_dir={tmp_path}/cache",
    ]  # fmt: skip
    whole = run_command("train", config, *changes, "name=whole")
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "runs" / "whole"
    losses = losses_of(run)
    assert len(losses) == 108 and losses[-1] < 0.2 * losses[0]
    answers = {
        phase: [json.loads(line) for line in (run / "samples" / f"{phase}.jsonl").read_text().splitlines()] for phase in ("before", "after")
    }
    right = {phase: sum(row["exact"] for row in rows) for phase, rows in answers.items()}
    assert right["before"] == 0 and right["after"] >= 10, answers["after"]
    assert answers["after"][0]["prompt"] == "This image shows"

    for checkpoint in (run / "checkpoints").iterdir():  # as after a crash behind step 40
        if checkpoint.name > "step-00000040":
            shutil.rmtree(checkpoint)
    shutil.rmtree(run / "model")
    again = run_command("train", config, *changes, "name=whole")
    assert again.returncode == 0 and "continuing from" in again.stdout, again.stderr
    assert losses_of(run) == pytest.approx(losses, rel=1e-5)

    before, _ = load(run / "initial_model")
    model, processor = load(run / "model")
    start = before.state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert not any(name.startswith("model.vision_encoder") for name in moved) and any("projector" in name for name in moved)
    inputs = inputs_of(processor, "This image shows", (Image.new("RGB", (40, 30), "lime"),))
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(answer, skip_special_tokens=True).strip() == "a lime picture ."
