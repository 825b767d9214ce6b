"""The merged model is the trained one: on the rounded weights exactly, on the original ones as PEFT itself merges."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, child_environment
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.data.encode import Encoder
from vlm_dist.errors import ModelError
from vlm_dist.models import merge
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.models.merge import merge_16bit

CPU = torch.device("cpu")
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the triangle?"}]}]


def trained(base: str, lora: LoraConfig, folder: Path, *, load_in_4bit: bool = True):
    """A model with adapters that have moved, saved to `folder`; and its processor."""
    model, processor, family = load_model(ModelConfig(name=base, load_in_4bit=load_in_4bit), base, CPU, lora=lora)
    torch.manual_seed(0)
    model = add_lora(model, family, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model.eval(), processor


def logits(model, processor) -> torch.Tensor:
    inputs = Encoder(processor, 1024).encode_prompt(QUESTION, [Image.new("RGB", (40, 30), "red")]).inputs
    with torch.no_grad():
        return model(**inputs).logits.float()


def load_merged(folder: Path, dtype=torch.float32):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture
def in_float32(monkeypatch):
    """The merged file in float32, so that rounding to 16 bit hides nothing."""
    monkeypatch.setattr(merge, "_sixteen_bit", lambda _: torch.float32)


def check_dequantised(base: str, lora: LoraConfig, folder: Path) -> None:
    model, processor = trained(base, lora, folder / "adapter")
    merge_16bit(ModelConfig(name=base), folder / "adapter", processor, folder / "merged", "dequantised", torch.float32)
    expected = logits(model, processor)
    torch.testing.assert_close(logits(load_merged(folder / "merged"), processor), expected, rtol=1e-4, atol=2e-4)
    with model.disable_adapter():
        assert (logits(model, processor) - expected).abs().max() > 0.05  # the adapter counts


def test_on_dequantised_weights_the_logits_are_those_of_training(any_checkpoint, tmp_path, in_float32):
    projector = "full" if any_checkpoint.endswith("gemma3") else "lora"  # Gemma 3's is one bare matrix
    check_dequantised(any_checkpoint, LoraConfig(r=4, r_vision=2, projector=projector), tmp_path)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mini_vlm"])
@pytest.mark.parametrize(
    "options",
    [{"projector": "full", "rslora": True}, {"dora": True}, {"bias": "all", "modules_to_save": ["lm_head"]}, {"language": False}],
    ids=["projector trained whole", "dora", "biases and head", "vision only"],
)
def test_every_form_of_adapter(checkpoint, family, options, tmp_path, in_float32):
    check_dequantised(checkpoint(family), LoraConfig(r=4, **options), tmp_path)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama", "gemma3"])
def test_on_the_original_weights_it_is_what_peft_merges(checkpoint, family, tmp_path, in_float32):
    from peft import PeftModel

    base = checkpoint(family)
    _, processor = trained(base, LoraConfig(r=4, dora=True), tmp_path / "adapter")
    merge_16bit(ModelConfig(name=base), tmp_path / "adapter", processor, tmp_path / "merged", "original", torch.float32)
    plain, _, _ = load_model(ModelConfig(name=base, load_in_4bit=False), base, CPU)
    reference = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).merge_and_unload()
    torch.testing.assert_close(logits(load_merged(tmp_path / "merged"), processor), logits(reference, processor), rtol=1e-5, atol=1e-5)


def test_in_16_bit_with_the_keys_of_the_base(checkpoint, tmp_path):
    """What is written by default: bfloat16, loadable by plain transformers, close within bfloat16's rounding."""
    from transformers import AutoConfig, AutoProcessor

    base = checkpoint("qwen2_5_vl")
    model, processor = trained(base, LoraConfig(r=4), tmp_path / "adapter")
    out = tmp_path / "merged"
    merge_16bit(ModelConfig(name=base), tmp_path / "adapter", processor, out, "dequantised", torch.float32)
    stored, merged = load_file(Path(base) / "model.safetensors"), load_file(out / "model.safetensors")
    assert stored.keys() == merged.keys()
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16 and not (out / ".merged.partial").exists()
    assert AutoProcessor.from_pretrained(out).chat_template == processor.chat_template
    expected = logits(model, processor)
    difference = logits(load_merged(out), processor) - expected
    assert difference.norm() < 0.03 * expected.norm()  # bfloat16 keeps 8 bits


def test_a_base_in_many_files_stays_in_many_files(checkpoint, tmp_path, in_float32):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    base = tmp_path / "base"
    AutoModelForImageTextToText.from_pretrained(checkpoint("llava")).save_pretrained(base, max_shard_size="200KB")
    AutoProcessor.from_pretrained(checkpoint("llava")).save_pretrained(base)
    check_dequantised(str(base), LoraConfig(r=4), tmp_path)
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    for name in files:
        with safe_open(tmp_path / "merged" / name, "pt") as file:
            assert set(file.keys()) == {key for key, place in index["weight_map"].items() if place == name}


def test_a_base_that_is_stored_in_4_bit(checkpoint, tmp_path, in_float32):
    model, processor, _ = load_model(ModelConfig(name=checkpoint("llava")), checkpoint("llava"), CPU)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    check_dequantised(base, LoraConfig(r=4), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with pytest.raises(ModelError, match="stored in 4 bit, so the original weights are not there; use --onto dequantised"):
        merge_16bit(ModelConfig(name=base), tmp_path / "adapter", processor, tmp_path / "other", "original", torch.float32)


def test_an_adapter_that_does_not_fit_is_refused(checkpoint, tmp_path):
    base = checkpoint("llava")
    _, processor = trained(base, LoraConfig(r=4), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(path)
    name = next(key for key in stored if "lora_A" in key)
    save_file({("base_model.model.elsewhere.lora_A.weight" if key == name else key): value for key, value in stored.items()}, path)
    with pytest.raises(ModelError, match="finds no module"):
        merge_16bit(ModelConfig(name=base), tmp_path / "adapter", processor, tmp_path / "merged", "original", torch.float32)
    assert not (tmp_path / "merged").exists()


def test_a_weight_that_the_base_lacks_is_told(checkpoint, tmp_path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(checkpoint("llava"), base)
    _, processor = trained(str(base), LoraConfig(r=4), tmp_path / "adapter")
    stored = load_file(base / "model.safetensors")
    gone = next(key for key in stored if key.endswith("q_proj.weight"))
    save_file({key: value for key, value in stored.items() if key != gone}, base / "model.safetensors")
    with pytest.raises(ModelError, match="parts of the adapter find no weight in the base"):
        merge_16bit(ModelConfig(name=str(base)), tmp_path / "adapter", processor, tmp_path / "merged", "original", torch.float32)
    assert not (tmp_path / "merged").exists()


MERGE = """
import resource, sys, torch
from pathlib import Path
from vlm_dist.config import ModelConfig
from vlm_dist.models.load import load_processor
from vlm_dist.models.merge import merge_16bit
base, adapter, out = sys.argv[1:]
torch.nn.functional.silu(torch.ones(64, 64) @ torch.ones(64, 64))
processor = load_processor(ModelConfig(name=base), base)
import peft, bitsandbytes, transformers.models.llava.modeling_llava, transformers.models.llama.modeling_llama
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_16bit(ModelConfig(name=base), Path(adapter), processor, Path(out), "dequantised", torch.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_is_near_one_file(checkpoint, tmp_path):
    """A base of 600 MB in files of 50: merging never holds more than a fraction of it."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(checkpoint("llava"))
    config.text_config.hidden_size, config.text_config.intermediate_size, config.text_config.num_hidden_layers = 1024, 4096, 11
    base = tmp_path / "base"
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(base, max_shard_size="50MB")
    del model
    AutoProcessor.from_pretrained(checkpoint("llava")).save_pretrained(base)
    trained(str(base), LoraConfig(r=4, vision=False), tmp_path / "adapter")
    total = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert total > 550e6
    command = [sys.executable, "-c", MERGE, str(base), str(tmp_path / "adapter"), str(tmp_path / "merged")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=child_environment(), check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    extra = int(result.stdout.split()[-1]) * 1024
    assert extra < 0.45 * total, f"{extra:,} bytes more at the peak, for a base of {total:,}"
