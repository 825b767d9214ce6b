"""Frozen parts do not move and make no noise; the statistics of parts that train are state like their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from tests.conftest import losses_of, write_config
from tests.pretrained import language_model, vision_encoder
from vlm_dist import distributed, load_config, train
from vlm_dist.buffers import moving_buffers
from vlm_dist.checking.doctor import examine
from vlm_dist.checking.inspection import inspect
from vlm_dist.config import LoraConfig
from vlm_dist.errors import ModelError
from vlm_dist.families import FAMILIES
from vlm_dist.models.checkpointing import checkpoint_gradients
from vlm_dist.models.compose import compose
from vlm_dist.models.generate import encode_chat, generate
from vlm_dist.models.lora import add_lora, freeze_sides
from vlm_dist.models.modes import Statistics, hold_frozen
from vlm_dist.models.record import probe_inputs
from vlm_dist.models.trained import load_trained
from vlm_dist.run_dir import read_jsonl
from vlm_dist.serving.export import export_run
from vlm_dist.testing import tiny_families
from vlm_dist.testing.builders import BUILDERS
from vlm_dist.training import loss_scale

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def seeing_by_resnet(tmp_path_factory) -> str:
    """A mini VLM whose vision encoder has BatchNorm."""
    folder = tmp_path_factory.mktemp("parts")
    compose(vision_encoder(folder, "resnet"), language_model(folder, "chat"), folder / "model")
    return str(folder / "model")


@pytest.fixture
def start(settings, seeing_by_resnet, tmp_path):
    """Train with these settings; the run's folder."""

    def run(name: str, *overrides: str, **sections) -> Path:
        settings["model"] = {"name": seeing_by_resnet, "load_in_4bit": False, "dtype": "float32", **sections.pop("model", {})}
        train(load_config(write_config({**settings, "data": {**settings["data"]}, **sections, "name": name}, tmp_path), list(overrides)))
        return Path(settings["output_dir"]) / name

    return run


def statistics(path: Path) -> dict:
    return {name: tensor for name, tensor in load_file(path).items() if "running" in name or "num_batches" in name}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_that_is_computed_again_moves_statistics_once(start, monkeypatch):
    """In float16 a gradient that overflows makes the step begin anew: the statistics are those of one pass."""
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**24)
    runs = {dtype: start(dtype, "training.steps=1", lora=None, model={"dtype": dtype}) for dtype in ("float32", "float16")}
    assert sum(row["event"] == "overflow" for row in read_jsonl(runs["float16"] / "events.jsonl")) > 1
    found = {dtype: statistics(run / "model" / "model.safetensors") for dtype, run in runs.items()}
    for name, expected in found["float32"].items():
        if "num_batches" in name:
            assert found["float16"][name] == expected, name
        else:
            torch.testing.assert_close(found["float16"][name].float(), expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("family", tiny_families())
def test_a_frozen_tower_is_in_evaluation_mode(family):
    """Whatever calls train(), and after an answer; what trains is not, adapters' dropout least of all."""
    processor, model = BUILDERS[family]()
    row = FAMILIES[model.config.model_type]
    model = hold_frozen(add_lora(model, row, LoraConfig(vision=False, dropout=0.5)))
    asked = encode_chat(processor, *probe_inputs(processor)[0])
    for turn in (lambda: model.train(), lambda: generate(model, processor, asked, 1)):
        turn()
        assert model.training
        modes = {name.removeprefix("base_model.model."): module.training for name, module in model.named_modules()}
        assert not any(trains for name, trains in modes.items() if row.side_of(name) in ("vision", "projector"))
        dropouts = [trains for name, trains in modes.items() if ".lora_dropout." in name]
        assert dropouts and all(dropouts)
    assert not model.eval().training and not any(module.training for module in model.modules())


def test_gradients_through_a_frozen_language_model_are_still_recomputed(seeing_by_resnet):
    """Its layers say that they train, or nothing would be recomputed; inside, nothing drops out."""
    model = hf.AutoModelForImageTextToText.from_pretrained(seeing_by_resnet)
    layer = model.language_model.model.layers[0]
    layer.self_attn.attention_dropout = 0.9
    freeze_sides(model, FAMILIES["mini_vlm"], ["vision", "language"])
    checkpoint_gradients(model, FAMILIES["mini_vlm"], True)
    hold_frozen(model).train()
    calls = []
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(layer.training))
    processor = hf.AutoProcessor.from_pretrained(seeing_by_resnet)
    inputs = encode_chat(processor, *probe_inputs(processor)[0])
    losses = []
    for _ in range(2):
        losses.append(model(**inputs, labels=inputs["input_ids"], use_cache=False).loss)
        losses[-1].backward()
    assert losses[0] == losses[1]
    assert calls == [False] * 4 and layer.training and not layer.mlp.training


def test_a_frozen_encoder_keeps_its_statistics(start, seeing_by_resnet):
    before = statistics(Path(seeing_by_resnet) / "model.safetensors")
    run = start("frozen", lora=None, model={"freeze": ["vision"]})
    assert before and same(statistics(run / "model" / "model.safetensors"), before)
    log = (run / "logs" / "rank-0.log").read_text()
    assert "BatchNorm trains" not in log
    with_lora = start("lora", lora={"r": 2, "projector": "full"})
    assert not statistics(with_lora / "adapter" / "adapter_model.safetensors")
    load_trained(str(with_lora), CPU)  # its probe agrees


def test_statistics_that_train_are_state(start, seeing_by_resnet):
    """In checkpoints and in the model; a continued run has those of one that was never stopped; the start says that they move."""
    whole = start("whole", lora=None)
    final = statistics(whole / "model" / "model.safetensors")
    assert not same(final, statistics(Path(seeing_by_resnet) / "model.safetensors"))
    assert same(statistics(whole / "checkpoints" / "step-00000004" / "model.safetensors"), final)
    assert "BatchNorm trains in 6 layers of the vision side: each micro-batch (2 rows)" in (whole / "logs" / "rank-0.log").read_text()
    losses = losses_of(whole)
    shutil.rmtree(whole / "checkpoints" / "step-00000004")
    shutil.rmtree(whole / "model")
    again = start("whole", lora=None)
    assert losses_of(again) == losses and same(statistics(again / "model" / "model.safetensors"), final)
    load_trained(str(again), CPU)


def test_statistics_of_an_adapter(start, tmp_path):
    """Of modules that train whole beside it: in the adapter, and in what it is merged into."""
    run = start("whole_norms", lora={"r": 2, "modules_to_save": ["normalization"]})
    stored = statistics(run / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 18
    model, _ = load_trained(str(run), CPU)
    key = next(name for name in stored if "running_mean" in name)
    path, _, leaf = key.rpartition(".")
    assert torch.equal(getattr(model.get_submodule(path).modules_to_save["default"], leaf), stored[key])
    export_run(run, "merged-16bit", tmp_path / "merged", samples=1)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.allclose(merged[key.removeprefix("base_model.model.")].float(), stored[key], rtol=1e-2)


def test_the_probe_says_what_differs(start):
    """Not that the adapter, the base or the libraries may: which of them."""
    run = start("told", lora={"r": 2})
    record = json.loads((run / "adapter" / "vlm_dist.json").read_text())
    from vlm_dist.models.record import check_probe, read_record

    model, processor = load_trained(str(run), CPU)
    record = read_record(run / "adapter")
    assert record is not None and record["made_with"]["device"] == "cpu"
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    with torch.no_grad():
        norm.running_mean += 3.0
    far = {
        **record,
        "probe": {**record["probe"], "rows": [{**row, "logits": [9 * n for n in row["logits"]]} for row in record["probe"]["rows"]]},
    }
    with pytest.raises(ModelError, match=r"1 buffers of the base are not those .*vision_encoder.*running_mean; base and preprocessing"):
        check_probe(far, model, processor)
    with torch.no_grad():
        norm.running_mean -= 3.0
        norm.running_mean.copy_(norm.running_mean.round(decimals=6))
    far["made_with"] = {**record["made_with"], "peft": "0.1"}
    far["buffers"] = {}
    with pytest.raises(ModelError, match=r"peft was 0.1, is 0\."):
        check_probe(far, model, processor)
    far["made_with"] = record["made_with"]
    with pytest.raises(ModelError, match="libraries and device are those of the training, so the adapter's weights are not"):
        check_probe(far, model, processor)


def test_a_bad_batch_leaves_no_trace(seeing_by_resnet):
    model = hold_frozen(hf.AutoModelForImageTextToText.from_pretrained(seeing_by_resnet).train())
    buffers = moving_buffers(model)
    assert len(buffers) == 18
    kept = Statistics(model, distributed.alone())
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm(torch.randn(2, norm.num_features, 4, 4))
    kept.settle()
    good = norm.running_mean.clone()
    assert good.any()
    norm(torch.full((2, norm.num_features, 4, 4), torch.nan))
    assert norm.running_mean.isnan().all()
    kept.settle()
    assert torch.equal(norm.running_mean, good)


def test_doctor_and_inspect_tell_them(settings, seeing_by_resnet, tmp_path):
    settings |= {"lora": None}
    settings["model"] = {"name": seeing_by_resnet, "load_in_4bit": False}
    config = load_config(write_config(settings, tmp_path))
    found = {check.name: check for check in examine(config)}["BatchNorm"]
    assert found.state == "warn" and "6 layers of the vision side" in found.found and "model.freeze" in found.fix
    assert any("BatchNorm trains in 6 layers" in flag for flag in inspect(config, 1)["flags"])
    (sample,) = inspect(config, 1, heat=True)["rows"][0]
    assert sample["picture_tokens"] == 16 and sample["pictures"][0]["heat"].startswith("data:image")  # of a map, row by row
    frozen = load_config(write_config(settings, tmp_path), ["model.freeze=[vision]"])
    assert "BatchNorm" not in {check.name for check in examine(frozen)}
    assert not any("BatchNorm" in flag for flag in inspect(frozen, 1)["flags"])
