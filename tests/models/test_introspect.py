"""An architecture without a row is read off its modules, works, or is refused with what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from vlm_dist import FastVisionModel
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.errors import ModelError
from vlm_dist.families import FAMILIES
from vlm_dist.models.introspect import infer_family
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora, count_trainable
from vlm_dist.models.processor import load_processor
from vlm_dist.testing.parts import CLIP, small_text, small_tokenizer, template

CPU = torch.device("cpu")


def test_what_is_read_agrees_with_the_table(any_checkpoint):
    config = hf.AutoConfig.from_pretrained(any_checkpoint)
    with torch.device("meta"):
        model = hf.AutoModelForImageTextToText.from_config(config)
    row, read = FAMILIES[config.model_type], infer_family(model, config.model_type)
    for name, _ in model.named_parameters():
        assert read.side_of(name) == row.side_of(name), name
    assert read.head == row.head


@pytest.fixture
def untabled(tmp_path) -> str:
    """ViP-LLaVA: real, and in no row of the table."""
    tokenizer, ids = small_tokenizer("<image>")
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP), text_config=hf.LlamaConfig(**small_text(len(ids))), image_token_index=ids["<image>"],
        vision_feature_layers=[-2, -1], image_seq_length=4,
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size=size, crop_size=size), tokenizer, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template("<image>"),
    )  # fmt: skip
    hf.VipLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert config.model_type not in FAMILIES
    return str(tmp_path / "model")


def test_an_architecture_without_a_row_works(untabled):
    from PIL import Image

    from vlm_dist.data.encode import Encoder
    from vlm_dist.data.samples import Sample

    model, processor, family = load_model(ModelConfig(name=untabled), untabled, CPU)
    adapted = add_lora(model, family, LoraConfig(r=2, projector="lora"))
    counts = count_trainable(adapted, family)
    assert counts["vision"] and counts["projector"] and counts["language"]
    content = [{"type": "image"}, {"type": "text", "text": "What colour?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    encoded = Encoder(processor, 256).encode(Sample("k", "s", messages, [Image.new("RGB", (32, 32), "red")]))
    loss = adapted(**encoded.inputs, labels=encoded.labels).loss
    loss.backward()
    assert any(p.grad is not None for name, p in adapted.named_parameters() if "vision_tower" in name and "lora" in name)
    again, _ = FastVisionModel.from_pretrained(untabled)
    assert FastVisionModel.get_peft_model(again, r=2, finetune_vision_layers=False).peft_config["default"].r == 2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.LlamaConfig(), r"'llama' is a text-only language model \(model.mini_vlm joins one with a vision encoder\)"),
        (hf.ViTConfig(), "'vit' is no image-text-to-text architecture"),
        (hf.Pix2StructConfig(), "'pix2struct' has no row in .*, and its vision tower and projector has no common name; add a row"),
    ],
    ids=["text only", "pictures only", "uncommon names"],
)
def test_what_does_not_suffice_is_told(tmp_path, config, reason):
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason):
        load_model(ModelConfig(name=str(tmp_path)), str(tmp_path), CPU)


def test_an_unknown_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "from_the_future"}')
    with pytest.raises(ModelError, match=r"cannot be loaded: .*from_the_future"):
        load_model(ModelConfig(name=str(tmp_path)), str(tmp_path), CPU)


def copied(source: str, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "model"))


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path, reason: str, **settings) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        load_model(ModelConfig(name=str(folder), **settings), str(folder), CPU)
    assert "\n" not in str(caught.value)


def test_a_processor_without_chat_template(llava, tmp_path):
    folder = copied(llava, tmp_path)
    (folder / "chat_template.jinja").unlink()
    refused(folder, "has no chat template; use an instruction-tuned checkpoint, or add a chat_template.jinja")


@pytest.mark.parametrize("place", ["tokenizer_config.json", "of several", "chat_template.json"])
def test_a_chat_template_wherever_it_stands(llava, tmp_path, place):
    """Checkpoints of other years have it in the tokenizer's settings, or in a JSON file of its own."""
    folder = copied(llava, tmp_path)
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    if place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": text}))
    else:
        several = [{"name": "default", "template": text}, {"name": "tool_use", "template": "no"}]
        change_json(folder / "tokenizer_config.json", chat_template=text if place == "tokenizer_config.json" else several)
    processor = load_processor(ModelConfig(name=str(folder)), str(folder))
    expected = load_processor(ModelConfig(name=llava), llava)
    assert processor.chat_template == expected.chat_template == text
    processor.save_pretrained(tmp_path / "saved")  # as beside an adapter
    assert load_processor(ModelConfig(name=str(tmp_path / "saved")), str(tmp_path / "saved")).chat_template == text


def test_a_chat_template_that_leaves_pictures_out(llava, tmp_path):
    folder = copied(llava, tmp_path)
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(text.replace("<image>", ""))
    refused(folder, "puts no picture token into the text|fails on one picture and one word")


def test_a_processor_that_takes_no_pictures(llava, tmp_path):
    folder = copied(llava, tmp_path)
    for path in folder.glob("*processor_config.json"):
        path.unlink()
    refused(folder, "takes no pictures|cannot be loaded")


def test_remote_code_is_refused_and_named(llava, tmp_path):
    folder = copied(llava, tmp_path)
    change_json(
        folder / "config.json",
        model_type="homemade",
        auto_map={"AutoConfig": "code.HomeConfig", "AutoModelForImageTextToText": "code.Home"},
    )
    (folder / "code.py").write_text("raise SystemExit('the code ran')\n")
    refused(folder, r"would run Python code that comes with it \(AutoConfig: code.HomeConfig, AutoModelForImageTextToText: code.Home\)")


HOMEMADE = """
from transformers import LlavaConfig, LlavaForConditionalGeneration
class HomeConfig(LlavaConfig):
    model_type = "homemade"
class Home(LlavaForConditionalGeneration):
    config_class = HomeConfig
"""


def test_remote_code_runs_with_the_flag(llava, tmp_path):
    folder = copied(llava, tmp_path)
    change_json(
        folder / "config.json",
        model_type="homemade",
        auto_map={"AutoConfig": "code.HomeConfig", "AutoModelForImageTextToText": "code.Home"},
    )
    (folder / "code.py").write_text(HOMEMADE)
    weights = hf.LlavaForConditionalGeneration.from_pretrained(llava).state_dict()  # by the class's own names, which a new type needs
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model, _, family = load_model(ModelConfig(name=str(folder), trust_remote_code=True), str(folder), CPU)
    assert family.model_type == "homemade" and family.projector == ("model.multi_modal_projector",)
    adapted = FastVisionModel.get_peft_model(model, r=2)
    assert count_trainable(adapted, family)["vision"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pth"])
def test_pickled_weights_are_refused_without_reading_them(llava, tmp_path, name):
    folder = copied(llava, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / name)
    refused(folder, f"holds its weights as pickle \\({name}\\), which can run any code when it is read; convert them to safetensors")


def test_a_pickle_beside_safetensors_is_left_alone(llava, tmp_path):
    folder = copied(llava, tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert load_model(ModelConfig(name=str(folder)), str(folder), CPU)


def test_a_damaged_weight_file(llava, tmp_path):
    folder = copied(llava, tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(folder, "cannot be loaded")


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_weights_of_another_size(llava, tmp_path, load_in_4bit):
    folder = copied(llava, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("q_proj.weight"))
    save_file({**weights, name: weights[name][:8].clone()}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"in size \(8, 64\), its config.json says \(64, 64\)", load_in_4bit=load_in_4bit)


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_weight_that_is_missing(llava, tmp_path, load_in_4bit):
    """transformers would go on with random numbers."""
    folder = copied(llava, tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("q_proj.weight"))
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"lacks 1 weights that the model uses, e.g. .*q_proj.weight", load_in_4bit=load_in_4bit)
