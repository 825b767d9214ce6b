"""What a QLoRA training step keeps for its backward pass, with PyTorch's own modules and with our kernels, counted byte by byte.

    python scripts/bench/saved_activations.py --out docs/benchmarks/saved_activations.json

Every tensor that autograd saves is seen through saved_tensors_hooks; storages are counted once, weights not at all. The models are
wide enough (hidden 256, 6 layers, vocabulary 32,000) that activations, not tiny constants, decide; 10 % of the tokens are supervised.
The kernels themselves run, in Triton's interpreter: their PyTorch stand-ins on a CPU save other tensors.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from vlm_dist import distributed
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.data.encode import IGNORED
from vlm_dist.environment import describe_environment
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.patching import patch_model
from vlm_dist.quiet import quiet_libraries
from vlm_dist.run_dir import write_json
from vlm_dist.testing import tiny_checkpoint

FORMS = {
    "language and vision": {},
    "language only": {"vision": False},
    "last two language layers": {"vision": False, "layers": {"language": [-2, -1]}},
}


def build(family: str, folder: Path) -> str:
    """A checkpoint of the family, larger than the tiny one."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    tiny = tiny_checkpoint(family, folder / "tiny")
    config = AutoConfig.from_pretrained(tiny)
    text = config.get_text_config()
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size = 256, 1024, 6, 32_000
    text.num_attention_heads, text.num_key_value_heads = 16, 8
    for name in ("out_hidden_size",):  # the vision tower ends in the language model's width
        if hasattr(config.vision_config, name):
            setattr(config.vision_config, name, 256)
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * 6
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder / "model")
    AutoProcessor.from_pretrained(tiny).save_pretrained(folder / "model")
    return str(folder / "model")


def batch_of(processor: Any) -> dict[str, torch.Tensor]:
    from PIL import Image

    from vlm_dist.data.collate import collate
    from vlm_dist.data.encode import Encoder

    encoder = Encoder(processor, 100_000)
    text = "How many shapes are there? " * 60
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    encoded = encoder.encode_prompt([message], [Image.new("RGB", (64, 64), "red")])
    data = collate([encoded], processor.tokenizer.pad_token_id)
    data["labels"] = data["input_ids"].clone()
    data["labels"][:, : int(0.9 * data["labels"].shape[1])] = IGNORED
    return data


def saved_bytes(model: Any, data: dict[str, torch.Tensor]) -> int:
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = summed_loss(model, data)
    total = sum(seen.values())
    loss.backward()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["llava", "qwen2_5_vl"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    rows = []
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            path = build(family, Path(folder))
            for form, options in FORMS.items():
                found = {}
                for kernels in ("off", "all"):
                    lora = LoraConfig(r=8, **options)
                    model, processor, row = load_model(ModelConfig(name=path), path, torch.device("cpu"), lora=lora)
                    model = add_lora(model, row, lora).train()
                    patch_model(model, kernels)
                    found[kernels] = saved_bytes(model, batch_of(processor))
                ratio = found["all"] / found["off"]
                rows.append({"family": family, "trained": form, "saved_bytes": found, "ratio": ratio})
                print(f"{family:12} {form:26} {found['off'] / 2**20:8.1f} MiB -> {found['all'] / 2**20:8.1f} MiB ({ratio:.2f})")
    if arguments.out:
        write_json(arguments.out, {"environment": describe_environment(distributed.start()), "results": rows})


if __name__ == "__main__":
    main()
