"""Adapters of others, bases in 4 bit and bases that moved: all that PEFT loads loads here, and merges to the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.test_merge import load_merged, logits
from vlm_dist import FastVisionModel
from vlm_dist.cli.main import main
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.errors import ModelError
from vlm_dist.models import merge
from vlm_dist.models.adapters import base_of, find_adapter
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.models.record import compare_probes, make_record, probe, write_record
from vlm_dist.models.source import fingerprint
from vlm_dist.models.trained import load_adapter, load_trained

CPU = torch.device("cpu")


def of_peft(base: str, folder: Path, name: str = "default", **settings) -> Path:
    """What plain PEFT saves after training: an adapter of another name than "default" in a folder of that name."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(1)
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), PeftConfig(r=4, **settings), adapter_name=name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def loaded_by_peft(base: str, folder: Path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    return PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folder).eval()


def test_an_adapter_with_a_name(qwen, tmp_path, capsys):
    """In a subfolder: the only one is meant, of several their names are told in one line."""
    folder = of_peft(qwen, tmp_path / "saved", name="mine", target_modules=["q_proj"])
    assert not (folder / "adapter_config.json").exists() and find_adapter(str(folder)) == folder / "mine"
    model, processor = load_trained(str(folder), CPU)
    torch.testing.assert_close(logits(model.eval(), processor), logits(loaded_by_peft(qwen, folder / "mine"), processor))
    assert (
        main(["export", str(folder), "--to", "adapter", "--out", str(tmp_path / "out")]) == 0
        and find_adapter(str(tmp_path / "out")) == tmp_path / "out"
    )
    shutil.copytree(folder / "mine", folder / "other")
    capsys.readouterr()
    for command in (["export", str(folder), "--to", "adapter", "--out", str(tmp_path / "two")], ["generate", str(folder), "--prompt", "x"]):
        assert main(command) != 0
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{folder}: holds 2 adapters (mine, other); give one, such as {folder / 'mine'}" in line


@pytest.fixture(scope="module")
def tied(tmp_path_factory, qwen) -> str:
    """A tiny Qwen2.5-VL whose head is its embeddings, as the small released ones have it."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    folder = tmp_path_factory.mktemp("tied") / "base"
    config = AutoConfig.from_pretrained(qwen)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
    model = AutoModelForImageTextToText.from_pretrained(qwen, config=config)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(qwen).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return str(folder)


FORMS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["apart", "tied"])
def test_on_head_and_embeddings(qwen, tied, tmp_path, monkeypatch, form, kind):
    """Loaded as PEFT loads it; merged to the same logits, also where head and embeddings were one tensor and now are two."""
    base = {"apart": qwen, "tied": tied}[kind]
    adapter = of_peft(base, tmp_path / "adapter", **FORMS[form])
    model, processor = load_trained(str(adapter), CPU)
    expected = logits(loaded_by_peft(base, adapter), processor)
    torch.testing.assert_close(logits(model.eval(), processor), expected, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(merge, "_sixteen_bit", lambda _: torch.float32)
    merge.merge_16bit(base_of(adapter), adapter, processor, tmp_path / "merged", "original", torch.float32)
    merged = load_merged(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, processor), expected, rtol=1e-5, atol=2e-5)  # sums in another order
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) is False


def test_a_tied_base_stays_tied_where_neither_is_adapted(tied, tmp_path):
    adapter = of_peft(tied, tmp_path / "adapter", target_modules=["q_proj"])
    _, processor = load_trained(str(adapter), CPU)
    merge.merge_16bit(base_of(adapter), adapter, processor, tmp_path / "merged", "original", torch.float32)
    merged = load_merged(tmp_path / "merged")
    assert merged.lm_head.weight is merged.get_input_embeddings().weight


def test_what_it_holds_of_the_base_counts(qwen, tmp_path, monkeypatch):
    """PEFT stores the embeddings beside an adapter on them, and loads them over the base's."""
    adapter = of_peft(qwen, tmp_path / "adapter", target_modules=["embed_tokens"])
    path = adapter / "adapter_model.safetensors"
    save_file({key: value * (2 if "base_layer" in key else 1) for key, value in load_file(path).items()}, path)
    model, processor = load_trained(str(adapter), CPU)
    expected = logits(loaded_by_peft(qwen, adapter), processor)
    torch.testing.assert_close(logits(model.eval(), processor), expected, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(merge, "_sixteen_bit", lambda _: torch.float32)
    merge.merge_16bit(base_of(adapter), adapter, processor, tmp_path / "merged", "original", torch.float32)
    torch.testing.assert_close(logits(load_merged(tmp_path / "merged"), processor), expected, rtol=1e-5, atol=2e-5)


def test_export_of_an_adapter_that_no_run_made(qwen, tmp_path, capsys):
    adapter = of_peft(qwen, tmp_path / "mine", target_modules=["q_proj"])
    before = sorted(path.name for path in adapter.iterdir())
    assert main(["export", str(adapter), "--to", "merged-16bit", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    out = tmp_path / "mine-merged-16bit"
    assert told["out"] == str(out) and told["comparison"]["onto"] == "original" and told["comparison"]["samples"] == 2
    assert told["comparison"]["largest_logit_difference"] < 0.05 * told["comparison"]["logit_spread"]
    assert f"`mine` merged into its base. Base: `{qwen}`" in (out / "README.md").read_text()
    assert main(["export", str(adapter), "--to", "merged-16bit"]) == 2 and "exists already" in capsys.readouterr().err
    assert main(["export", str(adapter), "--to", "adapter", "--out", str(tmp_path / "copy"), "--base-model", qwen]) == 0
    model, _ = load_trained(str(tmp_path / "copy"), CPU)  # with the processor in it now
    assert (tmp_path / "copy" / "chat_template.jinja").exists() and model.peft_config["default"].r == 4
    assert sorted(path.name for path in adapter.iterdir()) == before


def test_eval_of_an_adapter_that_no_run_made(qwen, shards, tmp_path, capsys):
    adapter = of_peft(qwen, tmp_path / "mine", target_modules=["q_proj"])
    assert main(["eval", str(adapter), "--samples", "2"]) == 2
    assert "it names no held-out shards; give some with --data" in capsys.readouterr().err
    assert main(["eval", str(adapter), "--samples", "2", "--json", "--data", *shards["qa-heldout"]]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 2
    assert main(["eval", str(tmp_path / "nothing"), "--data", "x.tar"]) == 2 and "no run directory" in capsys.readouterr().err


def test_a_base_that_moved(llava, tmp_path, capsys):
    base = shutil.copytree(llava, tmp_path / "base")
    adapter = of_peft(str(base), tmp_path / "mine", target_modules=["q_proj"])
    asked = ["generate", str(adapter), "--prompt", "hi", "--max-new-tokens", "2"]
    assert main(asked) == 0
    base.rename(tmp_path / "elsewhere")
    answer = capsys.readouterr().out
    assert main(asked) == 4
    line = capsys.readouterr().err
    assert f"its base {base} does not exist; say where it is now with --base-model" in line and line.count("\n") == 1
    assert main([*asked, "--base-model", str(tmp_path / "elsewhere")]) == 0
    assert capsys.readouterr().out == answer
    assert main([*asked, "--base-model", str(tmp_path / "typo")]) == 4
    assert f"--base-model: {tmp_path / 'typo'} does not exist" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "elsewhere"), "--prompt", "hi", "--base-model", llava]) == 4
    assert "is no adapter, so it has no base" in capsys.readouterr().err


def test_a_base_of_another_architecture_is_refused_in_one_line(llava, qwen, tmp_path):
    adapter = of_peft(qwen, tmp_path / "mine", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ModelError, match=r"the adapter does not fit the model in '.*' \(.+\)|fit no module of the model") as caught:
        load_trained(str(adapter), CPU, base_model=llava)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{"), r"adapter_config.json: is damaged"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"there is no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), r"weights are pickled"),
    ],
)
def test_damaged_folders(llava, tmp_path, damage, reason):
    adapter = of_peft(llava, tmp_path / "mine", target_modules=["q_proj"])
    damage(adapter)
    with pytest.raises(ModelError, match=reason):
        load_trained(str(adapter), CPU)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def in_4bit(request, tmp_path_factory, llava) -> str:
    """A base saved in NF4 with bfloat16 compute, packed in bytes, some layers left out: as the ones of Unsloth are published."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "multi_modal_projector", "model.language_model.layers.0.mlp"],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("nf4") / "base"
    dtype = getattr(torch, request.param)
    AutoModelForImageTextToText.from_pretrained(llava, quantization_config=settings, dtype=dtype).save_pretrained(folder)
    AutoProcessor.from_pretrained(llava).save_pretrained(folder)
    return str(folder)


def test_a_base_stored_in_4bit_computes_in_one_type(in_4bit):
    """float32 on a CPU, whatever it was saved with; and packed in it too, for ZeRO-3."""
    from bitsandbytes.nn import Linear4bit

    model, processor, _ = load_model(ModelConfig(name=in_4bit), in_4bit, CPU)
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert layers and {layer.compute_dtype for layer in layers} == {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert type(model.model.language_model.layers[0].mlp.up_proj) is torch.nn.Linear
    asked = {"name": in_4bit, "dtype": "bfloat16"}
    coarse, _, _ = load_model(ModelConfig(**asked), in_4bit, CPU)
    assert 1e-4 < compare_probes(probe(model, processor), probe(coarse, processor)) < 0.15  # the probe's limit for bfloat16


def test_an_adapter_on_a_base_stored_in_4bit(in_4bit, tmp_path, monkeypatch):
    """Loads with its probe, trained in whichever form of the kernels; and merges to its own logits."""
    lora = LoraConfig(r=4)
    model, processor, family = load_model(ModelConfig(name=in_4bit), in_4bit, CPU, lora=lora)
    model = add_lora(model, family, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    write_record(make_record(model, processor, ModelConfig(name=in_4bit), fingerprint(in_4bit)), adapter)
    again, _ = load_adapter(adapter, base_of(adapter), CPU)  # checks the probe
    expected = logits(again.eval(), processor)
    monkeypatch.setattr(merge, "_sixteen_bit", lambda _: torch.float32)
    merge.merge_16bit(base_of(adapter), adapter, processor, tmp_path / "merged", "dequantised", torch.float32)
    torch.testing.assert_close(logits(load_merged(tmp_path / "merged"), processor), expected, rtol=1e-4, atol=2e-4)
    with pytest.raises(ModelError, match=r"model.load_in_4bit=false: '.*' is quantised \(bitsandbytes, 4 bit\)"):
        FastVisionModel.from_pretrained(str(adapter), load_in_4bit=False)


def test_a_base_stored_in_4bit_alone(in_4bit):
    """generate and chat take it as it is; train refuses to hold it otherwise."""
    model, _ = load_trained(in_4bit, CPU)
    assert model.is_loaded_in_4bit
    with pytest.raises(ModelError, match=r"is quantised \(bitsandbytes, 4 bit\), so its 16-bit weights are not there"):
        load_model(ModelConfig(name=in_4bit, load_in_4bit=False), in_4bit, CPU)


def test_a_base_quantised_by_others_is_refused(llava, tmp_path):
    base = Path(shutil.copytree(llava, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match=r"is quantised \(gptq, 4 bit\), and adapters train on"):
        load_model(ModelConfig(name=str(base)), str(base), CPU)
