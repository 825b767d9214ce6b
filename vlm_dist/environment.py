"""What a run ran on: versions, hardware and command line."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

from vlm_dist.distributed import Ranks
from vlm_dist.redaction import redacted_words
from vlm_dist.run_dir import PRIVATE, RunDir, write_json

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "webdataset", "triton", "ray", "wandb", "numpy", "pillow")


def describe_environment(ranks: Ranks) -> dict[str, Any]:
    """Versions, hardware and command line, with anything that looks like a secret left out."""
    import torch

    return {
        "command": redacted_words(sys.argv),
        "python": platform.pythonversion(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "ranks": ranks.world_size,
        "device": str(ranks.device),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cpus": os.cpu_count(),
    }


def write_environment(run: RunDir, ranks: Ranks) -> None:
    if ranks.is_first:
        write_json(run.environment, describe_environment(ranks), mode=PRIVATE)


def version(package: str) -> str | None:
    """Of an installed package; None: it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
