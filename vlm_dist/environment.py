"""What a run ran on: versions, hardware and command line."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
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
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "ranks": ranks.world_size,
        "device": str(ranks.device),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cpus": os.cpu_count(),
    }


def available_memory() -> int:
    """Bytes of the host's memory that this process can still take: what is free, or what its control group leaves."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return available


def write_environment(run: RunDir, ranks: Ranks) -> None:
    if ranks.is_first:
        write_json(run.environment, describe_environment(ranks), mode=PRIVATE)


def version(package: str) -> str | None:
    """Of an installed package; None: it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
