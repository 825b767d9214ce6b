"""A published sparse model, planned from its sizes: it fits the card that the documentation says."""

from __future__ import annotations

import pytest

from vlm_dist.config_load import parse_config
from vlm_dist.planning.gpus import find_gpu
from vlm_dist.planning.plan import make_plan, open_planner
from vlm_dist.testing.full_size import full_size_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
YAML = """
name: planned
model: {gradient_checkpointing: true}
lora: {r: 16, vision: false}
data: {train: nowhere.tar, max_seq_length: 2048}
training: {steps: 1, global_batch: 1, micro_batch: 1}
"""


def test_30b_a3b_fits_an_rtx_4090(tmp_path):
    folder = full_size_config("qwen3-vl-30b-a3b", tmp_path / "30b")
    config = parse_config(YAML, [f"model.name={folder}"])
    with open_planner(config, find_gpu("rtx4090"), 1, size=(1024, 1024)) as planner:
        plan = make_plan(planner, others=False)
    own, memory = plan["own"], plan["own"]["memory"]
    packed = memory["base in 4 bit"] + memory["its scales"]
    experts = 48 * 128 * 3 * 768 * 2048
    assert 4.12 / 8 * experts < packed < 1.1 * 4.127 / 8 * experts  # and the attention and the vision tower
    assert own["fits"] and own["total"] < 23e9
    assert "mlp.gate 12,582,912" in plan["weights"][0]  # 48 routers of 128 x 2048
