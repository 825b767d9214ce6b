"""Any encoder that gives a sequence or a map; the language model's own chat template; a checkpoint that needs no vlm_dist."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors import safe_open

from tests.conftest import child_environment, write_config
from vlm_dist import load_config
from vlm_dist.checking.dry_run import dry_run
from vlm_dist.cli.main import main
from vlm_dist.config import DataConfig
from vlm_dist.data.encode import IGNORED, Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.models.card import adapter_card
from vlm_dist.models.compose import compose, read_parts
from vlm_dist.models.mini_vlm import MiniVLM, features_of
from vlm_dist.models.save import save_model

PICTURE = Image.new("RGB", (50, 40), "red")


@pytest.mark.parametrize(
    ("sees", "tokens", "width"),
    [
        ("resnet", 16, 24), ("resnet_backbone", 16, 24), ("convnext", 16, 24), ("efficientnet", 1, 320), ("swin", 16, 32),
        ("dinov3", 7, 64), ("timm", 1, 512), ("timm_vit", 5, 192),
    ],
)  # fmt: skip
def test_an_encoder_of_maps_or_sequences(vision, language, tmp_path, sees, tokens, width):
    """What its code gives without weights is what the model then takes, and gradients reach the projector."""
    parts = compose(vision(sees), language("llama"), tmp_path / "model")
    assert (parts.image_tokens, parts.vision_width) == (tokens, width)
    model = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "model")
    inputs = processor(text=["<image><image> What?"], images=[[PICTURE, PICTURE]], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2 * tokens
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.projector.parameters())
    assert model.projector.projection[-1].weight.grad.any()
    original = hf.AutoModel.from_pretrained(vision(sees)).state_dict()
    assert all(torch.equal(original[name], tensor) for name, tensor in model.vision_encoder.state_dict().items())


@pytest.mark.parametrize("name", ["timm", "timm_vit"])
def test_pictures_for_an_encoder_of_timm_are_as_timm_makes_them(vision, language, name):
    """Up to the rounding of resized pixels to whole numbers; sizes whose crop has one centre."""
    own, stored = hf.AutoImageProcessor.from_pretrained(vision(name)), read_parts(vision(name), language("llama")).images
    pixels = torch.randint(0, 255, (7, 10, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for size in ((32, 32), (36, 36), (90, 54), (200, 180)):
        picture = Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BICUBIC)
        made, expected = (processor(picture, return_tensors="pt")["pixel_values"] for processor in (stored, own))
        torch.testing.assert_close(made, expected, rtol=0, atol=1.01 / 255 / 0.2)


def test_an_encoder_of_timm_that_wants_borders_is_told(vision, language):
    with pytest.raises(ModelError, match=r"timm_border' wants pictures of 32 x 32, crop_mode=border; an encoder of timm needs square"):
        read_parts(vision("timm_border"), language("llama"))


def test_a_map_goes_row_by_row():
    maps = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4)  # [N, width, rows, columns]
    first = features_of(hf.modeling_outputs.BaseModelOutput(last_hidden_state=maps), 3)
    assert first.shape == (2, 8, 3) and torch.equal(first[1, 5], maps[1, :, 1, 1])
    last = features_of(hf.modeling_outputs.BaseModelOutput(last_hidden_state=maps.permute(0, 2, 3, 1)), 3)  # as timm's Swin
    assert torch.equal(first, last)
    assert torch.equal(features_of(hf.modeling_outputs.BackboneOutput(feature_maps=(maps, maps))), first)
    with pytest.raises(ValueError, match=r"shape \(2, 3\); a sequence"):
        features_of(hf.modeling_outputs.BaseModelOutput(last_hidden_state=maps[..., 0, 0]))


def settings_of(settings, vision: str, language: str) -> dict:
    settings["model"] = {"mini_vlm": {"vision": vision, "language": language}, "load_in_4bit": False, "freeze": ["vision"]}
    return settings | {"lora": None}


def test_a_dry_run_knows_what_does_not_fit(settings, vision, language, tmp_path, capsys):
    def plan(sees: str, speaks: str, **data):
        changed = settings_of(settings, sees, speaks)
        changed["data"] |= data
        return dry_run(load_config(write_config(changed, tmp_path)), 1)

    known = plan(vision("resnet"), language("chat"))
    assert known["model"].startswith("a new mini VLM: resnet (16 tokens of 24 a picture) and llama (width 64), the language model's chat")
    assert "plain template" in plan(vision("resnet"), language("llama"))["model"]
    with pytest.raises(
        ModelError, match=r"model.mini_vlm.vision: .*siglip2.* cannot be used on pixels alone: .*(spatial_shapes|attention)"
    ):
        plan(vision("siglip2_of_any_shape"), language("llama"))
    with pytest.raises(ModelError, match=r"model.mini_vlm.language: .* is of type 'resnet', no causal language model"):
        plan(vision("resnet"), vision("resnet"))
    with pytest.raises(ConfigError, match="a picture alone is 197 tokens"):
        plan(vision("vit224"), language("llama"), max_seq_length=150)
    without = tmp_path / "without"
    without.mkdir()
    for name in os.listdir(vision("resnet")):
        if not name.endswith(".safetensors"):
            os.symlink(f"{vision('resnet')}/{name}", without / name)
    with pytest.raises(ModelError, match=r"model.mini_vlm.vision: .*no safetensors"):
        plan(str(without), language("llama"))
    config = write_config(settings_of(settings, vision("resnet"), language("chat")), tmp_path)
    assert main(["train", str(config), "--dry-run"]) == 0 and "resnet (16 tokens" in capsys.readouterr().out


def test_the_language_models_own_chat_template(vision, language, tmp_path):
    """Turns as it knows them, a picture where it stands, and the answer alone supervised."""
    compose(vision("vit"), language("chat"), tmp_path / "model")
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "model")
    text = [{"type": "image"}, {"type": "text", "text": "What colour?"}]
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    written = processor.apply_chat_template(messages, tokenize=False)
    assert written == "<turn>system\nBe brief.</s>\n<turn>user\n<image>What colour?</s>\n<turn>assistant\nred</s>\n"
    asked = processor.apply_chat_template([{"role": "user", "content": "What?"}], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<turn>user\nWhat?</s>\n<turn>assistant\n")
    encoded = Encoder.of(processor, DataConfig(train=["x.tar"])).encode(Sample("key", "x.tar", messages, [PICTURE]))
    learnt = encoded.inputs["input_ids"][0][encoded.labels[0] != IGNORED]
    assert processor.tokenizer.decode(learnt).strip() == "red</s>"
    assert read_parts(vision("vit"), language("llama")).chat_template != processor.chat_template


def test_it_loads_without_vlm_dist(vision, language, tmp_path):
    """In a process that cannot import vlm_dist, with the code that lies beside the weights; the same logits."""
    compose(vision("resnet"), language("chat"), tmp_path / "model")
    assert (tmp_path / "model" / "mini_vlm.py").exists()
    code = f"""
import sys, json, torch
sys.modules["vlm_dist"] = None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
inputs = processor(text=["<image> What?"], images=[[Image.new("RGB", (50, 40), "red")]], return_tensors="pt")
model.save_pretrained({str(tmp_path / "again")!r}); processor.save_pretrained({str(tmp_path / "again")!r})
print(json.dumps(model(**inputs).logits[0, -1].tolist()))
"""
    environment = child_environment(HF_MODULES_CACHE=str(tmp_path / "modules"), PYTHONPATH="")
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    model = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "again").eval()
    assert isinstance(model, MiniVLM)  # ours, where vlm_dist is
    inputs = hf.AutoProcessor.from_pretrained(tmp_path / "again")(text=["<image> What?"], images=[[PICTURE]], return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits[0, -1], torch.tensor(json.loads(done.stdout.splitlines()[-1])))


def test_a_card_says_what_would_run():
    plain, own = (adapter_card("x", "base", merged="merged onto the original weights", own_code=code) for code in (False, True))
    assert "vllm serve" in plain and "trust_remote_code" not in plain
    assert "vllm serve" not in own and own.count("trust_remote_code=True") == 3 and "read it first" in own
    assert 'from_pretrained("base", trust_remote_code=True)' in adapter_card("x", "base", own_code=True)


def test_a_tied_head_is_stored_once(vision, language, tmp_path):
    """As the trainer saves it: trained parameters by their one name, the rest from the model."""
    compose(vision("vit"), language("llama"), tmp_path / "model")
    model = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "model")
    weights = {name: parameter.detach() + 1 for name, parameter in model.named_parameters() if "vision" not in name}
    save_model(model, weights, processor, tmp_path / "trained")

    def names(folder):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as stored:
            return sorted(stored.keys())

    assert names("trained") == names("model")
    again = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "trained")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, weights.get(name, model.get_parameter(name))), name
