"""The kernels' GPU tests on a card that is not there: every launcher's own arguments through Triton's binder and ptxas for sm_90."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.conftest import ROOT, child_environment
from tests.pretended.card import pretended_card
from tests.pretended.launches import pretended_launches
from vlm_kernels.aot import KERNELS
from vlm_kernels.launch import launch

swiglu = importlib.import_module("vlm_kernels.swiglu")


def jit_kernels() -> set[str]:
    """Those that are launched, in the source."""
    sources = {name: (ROOT / "kernels" / "vlm_kernels" / f"{name}.py").read_text() for name in KERNELS}
    return {f"{name}.{kernel}" for name, text in sources.items() for kernel in re.findall(r"\blaunch\(\s*(_\w*kernel),", text)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_launch(tmp_path):
    launched = tmp_path / "launched.json"
    # products of bfloat16, and torch's own check, need a real card; the one that is pretended looks on itself
    real = "not ((nf4 or grouped) and dtype1) and not torch_library and not looks_on"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "tests.pretended.plugin", "-m", "gpu",
               "-k", real, "tests/kernels/test_kernels.py"]  # fmt: skip
    environment = child_environment(LAUNCHED=str(launched))
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    found = json.loads(launched.read_text())
    assert {kernel for kernel, *_ in found} == jit_kernels()
    assert {"*fp32", "*bf16", "*fp16"} <= {kind for _, *kinds in found for kind in kinds}


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("rows", "width"), [(3, 64), (3, 65), (1, 64), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_compiled_is_found_again(dtype, rows, width, offset):
    """The kernel that `launch` finds the second time is the one that Triton takes for these arguments: pointers that are aligned or
    not, numbers that 16 divides or not, and one."""
    kernel = swiglu._forward_kernel
    with pretended_card(), pretended_launches() as launches:
        launches.compute = False
        others = [torch.zeros(64 * 4 + 1, device="cuda", dtype=kind) for kind in (torch.bfloat16, torch.float32)]
        for gate, other in itertools.product(others, (64, 63)):
            launch(kernel, (4, 1), gate, gate, torch.zeros_like(gate), other, other, other, BLOCK=1024)
        gate = torch.zeros(rows * width + 1, device="cuda", dtype=dtype)[offset:]
        arguments = gate, gate, torch.zeros_like(gate), width, width, width
        for _ in range(2):
            launch(kernel, (rows, 1), *arguments, BLOCK=1024)
        kernel[(rows, 1)](*arguments, BLOCK=1024)
    first, again, by_triton = launches[-3:]
    assert first == again and replace(again, grid=by_triton.grid) == by_triton and again.grid[:2] == by_triton.grid[:2]


def test_the_launches_are_seen():
    kernels = jit_kernels()
    defined = {
        f"{name}.{node.name}"
        for name in KERNELS
        for node in ast.parse((ROOT / "kernels" / "vlm_kernels" / f"{name}.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("kernel")
    }
    assert kernels == defined and len(kernels) > 8
