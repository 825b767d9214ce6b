"""Does vLLM load a merged checkpoint? Its own model class and weight loader, on a CPU; nothing is computed. Run it with the python of an
environment that has vLLM (it needs another torch than ours):

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm
    /tmp/vllm/bin/python scripts/bench/vllm_load.py runs/quickstart/export/merged-16bit --out docs/benchmarks/vllm_load.json

The wheels for CUDA lack the CPU's operators; those that a model names while it is built are declared here, and never called.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.remove(str(Path(__file__).resolve().parent))  # there kernels.py would hide Hugging Face's package `kernels`

DECLARED = ("gelu_quick", "silu_and_mul", "gelu_new", "gelu_fast", "gelu_and_mul", "gelu_tanh_and_mul")


def load(folder: Path) -> dict[str, Any]:
    import torch
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    operators = torch.library.Library("_C", "FRAGMENT")
    for name in DECLARED:
        operators.define(f"{name}(Tensor! out, Tensor input) -> ()")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    arguments = EngineArgs(model=str(folder), dtype="float32", enforce_eager=True, max_model_len=256, skip_mm_profiling=True)
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "env://", 0, "gloo")
        initialize_model_parallel(1, 1)
        model = get_model(vllm_config=config)
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **_compare(model, folder),
    }


def _compare(model: Any, folder: Path) -> dict[str, Any]:
    """vLLM's fused projection of the first layer beside the checkpoint's three."""
    import torch
    from safetensors.torch import load_file

    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    last = "layers.0.self_attn.q_proj.weight"
    start = next(name for name in stored if name.endswith(last) and "vis" not in name).removesuffix("q_proj.weight")
    parameters = {name: parameter for name, parameter in model.named_parameters() if "vis" not in name}
    fused = next(parameter for name, parameter in parameters.items() if name.endswith("layers.0.self_attn.qkv_proj.weight"))
    parts = torch.cat([stored[f"{start}{part}_proj.weight"].float() for part in "qkv"])
    return {"first_layer_equal": torch.equal(fused.float(), parts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a merged checkpoint")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    versions = {name: metadata.version(name) for name in ("vllm", "torch", "transformers")}
    try:
        found = {"loaded": True, **load(arguments.folder)}
    except (ValueError, KeyError) as error:
        found = {"loaded": False, "why": str(error).split(". The available")[0][:300]}
    result = {"model_type": json.loads((arguments.folder / "config.json").read_text())["model_type"], "versions": versions, **found}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
