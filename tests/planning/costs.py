"""What a micro-batch of a tiny model of each family costs, to a file: `python -m tests.planning.costs tests/planning/pinned.json` pins it.

A process of its own, and checkpoints of its own, so that what other tests leave behind is not counted.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.planning.test_count import batch_of, config_of
from vlm_dist.models.load import read_model_config
from vlm_dist.models.processor import load_processor
from vlm_dist.planning.count import count_micro_batch
from vlm_dist.planning.gpus import find_gpu
from vlm_dist.planning.profile import described
from vlm_dist.testing import tiny_checkpoint

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "mllama")


def costs_of(name: str) -> dict[str, int]:
    """Launches, bytes moved, bytes kept and waits of the tiny checkpoint `name` with NF4 and adapters, on rows of pictures and text."""
    config = config_of(name)
    batch = batch_of(load_processor(config.model, name))
    counted = count_micro_batch(config, *read_model_config(config.model, name), torch.bfloat16, batch, by_part=True)
    found = described(counted, find_gpu("h100"), batch["input_ids"].numel(), 1)
    held = sum(counted.kept.values())
    assert held == pytest.approx(counted.saved, rel=0.02) and not any(not row["part"] for row in found["rows"])
    return {"launches": found["launches"], "moved_bytes": found["moved_bytes"], "kept_bytes": counted.saved, "waits": found["device_waits"]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {family: costs_of(str(tiny_checkpoint(family, f"{folder}/{family}"))) for family in FAMILIES}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
