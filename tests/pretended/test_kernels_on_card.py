"""The kernels' GPU tests on a card that is not there: every launcher's own arguments through Triton's binder and ptxas for sm_90."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT, child_environment
from vlm_kernels.aot import KERNELS


def jit_kernels() -> set[str]:
    """Those that are launched: with a grid, in the source."""
    sources = {name: (ROOT / "kernels" / "vlm_kernels" / f"{name}.py").read_text() for name in KERNELS}
    return {f"{name}.{kernel}" for name, text in sources.items() for kernel in re.findall(r"^\s+(_\w*kernel)\[", text, re.MULTILINE)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_launch(tmp_path):
    launched = tmp_path / "launched.json"
    real = "not ((nf4 or grouped) and dtype1) and not torch_library"  # products of bfloat16, and torch's own check, need a real card
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "tests.pretended.plugin", "-m", "gpu",
               "-k", real, "tests/kernels/test_kernels.py"]  # fmt: skip
    environment = child_environment(LAUNCHED=str(launched))
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    found = json.loads(launched.read_text())
    assert {kernel for kernel, *_ in found} == jit_kernels()
    assert {"*fp32", "*bf16", "*fp16"} <= {kind for _, *kinds in found for kind in kinds}


def test_the_launches_are_seen():
    kernels = jit_kernels()
    defined = {
        f"{name}.{node.name}"
        for name in KERNELS
        for node in ast.parse((ROOT / "kernels" / "vlm_kernels" / f"{name}.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("kernel")
    }
    assert kernels == defined and len(kernels) > 8
