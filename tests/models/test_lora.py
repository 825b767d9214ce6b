"""Selective LoRA: layers, leaf names, ranks per side, modules that train whole, biases; what cannot be done says so."""

from __future__ import annotations

import math
import re

import pytest
import torch

from vlm_dist import FastVisionModel
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.errors import ModelError
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora

CPU = torch.device("cpu")


@pytest.fixture
def adapted(any_checkpoint):
    """options of LoraConfig -> (adapted model, family)."""

    def make(**options):
        lora = LoraConfig(r=4, **options)
        model, _, family = load_model(ModelConfig(name=any_checkpoint), any_checkpoint, CPU, lora=lora)
        return add_lora(model, family, lora), family

    return make


def adapters(model) -> dict[str, torch.nn.Module]:
    return {name.removeprefix("base_model.model."): module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def rank(module) -> int:
    return module.lora_A["default"].out_features // getattr(module, "num_experts", 1)


def test_rank_and_scale_per_side(adapted, any_checkpoint):
    if any_checkpoint.endswith("gemma3"):  # its projector is one bare matrix
        with pytest.raises(ModelError, match=r"lora\.projector: the projector of 'gemma3' has no linear layer"):
            adapted(projector="lora")
        return
    model, family = adapted(r_vision=2, r_projector=3, alpha_language=32, projector="lora", rslora=True)
    seen = set()
    for name, module in adapters(model).items():
        side = family.side_of(name)
        expected = {"vision": 2, "projector": 3, "language": 4}[side]
        assert rank(module) == expected, name
        assert module.scaling["default"] == pytest.approx((32 if side == "language" else 16) / math.sqrt(expected)), name
        seen.add(side)
    assert seen == {"vision", "projector", "language"}


def test_layers(adapted):
    model, family = adapted(layers={"language": [-1], "vision": [0]})
    found = {side: {int(re.findall(r"\.(\d+)\.", name)[0]) for name in adapters(model) if family.side_of(name) == side}
             for side in ("vision", "language")}  # fmt: skip
    depth = model.config.get_text_config().num_hidden_layers
    assert found["language"] == {depth - 1} and found["vision"] == {0}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"modules": ["q_projection"]}, r"lora.modules: no linear layer is called 'q_projection'; there are: .*q_proj"),
        ({"layers": {"language": [7]}}, r"lora.layers: language has layers 0 to 1, not 7"),
        ({"modules_to_save": ["head_of_state"]}, r"lora.modules_to_save: the model has no module 'head_of_state'"),
        ({"modules": ["fc1"], "vision": False}, r"lora: no linear layer of 'llava' matches"),
    ],
)
def test_what_does_not_exist_is_named(llava, options, reason):
    lora = LoraConfig(r=4, **options)
    model, _, family = load_model(ModelConfig(name=llava), llava, CPU, lora=lora)
    with pytest.raises(ModelError, match=reason):
        add_lora(model, family, lora)


def test_leaf_names(llava):
    model, _ = FastVisionModel.from_pretrained(llava)
    model = FastVisionModel.get_peft_model(
        model, target_modules=["q_proj", "v_proj"], layers_to_transform=[-1], finetune_vision_layers=False
    )
    names = list(adapters(model))
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "v_proj"} and len(names) == 2


def test_modules_that_train_whole(llava):
    """They are not quantised when the configuration names them before loading; a model already in 4 bit says so."""
    lora = LoraConfig(r=4, modules_to_save=["lm_head"], projector="full", bias="lora_only")
    model, _, family = load_model(ModelConfig(name=llava), llava, CPU, lora=lora)
    model = add_lora(model, family, lora)
    whole = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {"base_model.model.lm_head.modules_to_save.default.weight"} < whole
    assert any("multi_modal_projector" in name for name in whole) and any(name.endswith("out_proj.base_layer.bias") for name in whole)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if name in whole)

    model, _ = FastVisionModel.from_pretrained(llava)
    with pytest.raises(
        ModelError, match="'multi_modal_projector' is held in 4 bit, so it cannot train whole; load the model with load_in_4bit=False"
    ):
        FastVisionModel.get_peft_model(model, modules_to_save=["multi_modal_projector"])


def test_a_tied_head_cannot_train_alone(checkpoint):
    model, _ = FastVisionModel.from_pretrained(checkpoint("gemma3"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises(ModelError, match="shares its weights between input and output"):
        FastVisionModel.get_peft_model(model, modules_to_save=["lm_head"])


def test_trained_modules_come_back(llava, tmp_path):
    model, processor = FastVisionModel.from_pretrained(llava)
    model = FastVisionModel.get_peft_model(model, r=4, modules_to_save=["lm_head"], use_dora=True, bias="lora_only")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained_merged(str(tmp_path / "lora"), processor, save_method="lora")
    again, _ = FastVisionModel.from_pretrained(str(tmp_path / "lora"))  # its probe must come out again
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("out", None), "give the processor too"), (("out", "p", "merged_4bit"), "save_method='merged_4bit' is not supported")],
)
def test_save_methods(llava, arguments, reason, tmp_path):
    model, _ = FastVisionModel.from_pretrained(llava)
    model = FastVisionModel.get_peft_model(model, r=2)
    with pytest.raises(ModelError, match=reason):
        model.save_pretrained_merged(str(tmp_path / arguments[0]), *arguments[1:])
    assert not (tmp_path / "out").exists()
