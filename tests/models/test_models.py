"""Loading in 4 bit, adapters where they were asked for, and the two calls of FastVisionModel."""

from __future__ import annotations

import re

import pytest
import torch

from vlm_dist import FastVisionModel
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.errors import ModelError
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora, as_pattern, count_trainable, find_expert_targets, find_targets, freeze_sides

CPU = torch.device("cpu")


@pytest.fixture
def loaded(any_checkpoint):
    return load_model(ModelConfig(name=any_checkpoint), any_checkpoint, CPU)


def test_base_is_nf4_with_double_quantisation(loaded):
    from bitsandbytes.nn.modules import Linear4bit

    model, _, family = loaded
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert {family.side_of(name) for name in layers} >= {"vision", "language"}
    assert family.head not in layers
    for module in layers.values():
        assert module.weight.quant_state.quant_type == "nf4" and module.weight.quant_state.nested


def test_evaluating_leaves_the_4_bit_weights_alone(loaded):
    """bitsandbytes repacks them for a bfloat16 kernel on some CPUs: training would go on with other numbers."""
    model, processor, _ = loaded
    ids = processor.tokenizer("a red circle", return_tensors="pt").input_ids
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        trained = model.train()(input_ids=ids).logits
        evaluated = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(trained, evaluated)
    for name, parameter in model.named_parameters():  # as bytes: two 4-bit codes in a float's place may spell NaN
        assert torch.equal(weights[name].view(torch.uint8), parameter.detach().view(torch.uint8)), name


def wrapped(weights: list[str]) -> set[str]:
    """Where PEFT puts adapters on the weights of one module: one wrapper in another."""
    modules = [name.rpartition(".")[0] for name in weights]
    return {module + ".base_layer" * (modules.count(module) - 1) for module in modules} | set(modules)


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("attention", [True, False])
def test_adapters_stand_where_the_switches_say(loaded, vision, attention):
    model, _, family = loaded
    config = LoraConfig(r=2, vision=vision, language=True, attention=attention, mlp=not attention)
    targets = set(find_targets(model, family, config)) | wrapped(find_expert_targets(model, family, config))
    adapted = add_lora(model, family, config)
    found = {name.removeprefix("base_model.model.").split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name}
    assert found == targets
    adaptable = {"language"} if family.model_type == "glm4v_moe" and not attention else {"vision", "language"}  # see taken_for_experts
    assert {family.side_of(name) for name in found} == (adaptable if vision else {"language"})
    kind = re.compile(r"\.(self_attn|attn|attention|cross_attn|linear_attn)\." if attention else r"\.(mlp|feed_forward|experts)\b")
    assert all(kind.search(name) for name in found)
    counts = count_trainable(adapted, family)
    assert counts["projector"] == 0 and (counts["vision"] > 0) == (vision and "vision" in adaptable)


def test_a_pattern_matches_these_modules_only():
    names = ["model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.11.mlp.up_proj", "model.visual.blocks.3.attn.qkv"]
    pattern = re.compile(as_pattern(names, names))
    assert all(pattern.fullmatch(name) for name in names)
    some = re.compile(as_pattern(names[:1], names))
    assert [name for name in names if some.fullmatch(name)] == names[:1]
    for other in ("model.language_model.layers.0.mlp.gate_proj", "xmodel.visual.blocks.3.attn.qkv", "model.visual.blocks.x.attn.qkv"):
        assert not pattern.fullmatch(other)


def test_sides_freeze(any_checkpoint):
    model, _, family = load_model(ModelConfig(name=any_checkpoint, load_in_4bit=False), any_checkpoint, CPU)
    freeze_sides(model, family, ["vision"])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (family.side_of(name) != "vision")
    assert {family.side_of(name) for name, _ in model.named_parameters()} == {"vision", "projector", "language"}


def test_families_paths_exist(loaded):
    model, _, family = loaded
    for path in (family.vision, *family.projector, family.language, family.head):
        assert model.get_submodule(path) is not None


def test_fast_vision_model(any_checkpoint):
    model, processor = FastVisionModel.from_pretrained(any_checkpoint, max_seq_length=128, load_in_4bit=True, dtype=None)
    assert processor.tokenizer.model_max_length == 128
    adapted = FastVisionModel.get_peft_model(model, r=2, lora_alpha=4, finetune_vision_layers=False, use_gradient_checkpointing="unsloth")
    assert adapted.peft_config["default"].r == 2
    assert not any("vis" in name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad)
    again = FastVisionModel.get_peft_model(FastVisionModel.from_pretrained(any_checkpoint)[0], r=2, finetune_vision_layers=False)
    for (name, ours), (_, theirs) in zip(adapted.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours.detach().view(torch.uint8), theirs.detach().view(torch.uint8)), name  # random_state decides


@pytest.mark.parametrize("options", [{"bias": "some"}, {"target_modules": "q.*"}, {"r": 0}, {"use_gradient_checkpointing": "maybe"}])
def test_what_cannot_be_honoured_is_refused(llava, options):
    model, _ = FastVisionModel.from_pretrained(llava)
    with pytest.raises(ModelError, match=next(iter(options))):
        FastVisionModel.get_peft_model(model, **options)


def test_pickled_weights_are_refused(llava, tmp_path):
    import shutil

    shutil.copytree(llava, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds its weights as pickle"):
        load_model(ModelConfig(name=str(tmp_path / "model")), str(tmp_path / "model"), CPU)


def test_settings_reach_the_processor(qwen):
    from PIL import Image

    from vlm_dist.models.load import load_processor

    picture = Image.new("RGB", (400, 400))
    counts = []
    for size in ({}, {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}):
        processor = load_processor(ModelConfig(name=qwen, processor=size), qwen)
        counts.append(len(processor.image_processor(picture)["pixel_values"]))
    assert counts == [64, 16]
