"""The benchmark of the kernels goes through every case without a GPU, so that it runs when there is one."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import ROOT, child_environment
from vlm_kernels.aot import KERNELS


def test_dry_run(tmp_path):
    out = tmp_path / "kernels.json"
    command = [sys.executable, "scripts/bench/kernels.py", "--dry-run", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=child_environment(), timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["results"]
    assert {row["kernel"] for row in rows} == set(KERNELS) and all(row["ours"]["ms"] > 0 for row in rows)
    refused = subprocess.run(
        command[:2], capture_output=True, text=True, cwd=ROOT, env=child_environment(CUDA_VISIBLE_DEVICES=""), check=False
    )
    assert refused.returncode == 2 and "--dry-run" in refused.stderr
