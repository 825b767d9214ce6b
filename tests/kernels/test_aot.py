"""Every kernel compiles for every target, without spills and within the GPU's shared memory; the check itself can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from tests.conftest import ROOT, child_environment
from vlm_kernels import aot
from vlm_kernels.common import Compilation, multiplies_tiles

BEFORE_AMPERE = ("cuda:70", "cuda:75")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vlm_kernels.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=child_environment(), timeout=900, check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_for_every_target():
    result = run("--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert {row["target"] for row in rows} == set(aot.SHARED_LIMIT)
    for target in aot.SHARED_LIMIT:
        started = set(aot.KERNELS) - ({"grouped_linear"} if target in BEFORE_AMPERE else set())  # its launcher's caller loops there
        assert {row["kernel"].split(".")[0] for row in rows if row["target"] == target} == started
    for row in rows:
        assert row["spills"] == row["stack"] == 0 and 0 < row["registers"] <= 255, row
        assert row["stores"] and row["loads"], row
    # what moves most bytes moves them in the widest accesses that the GPU has
    wide = [
        row for row in rows if row["target"] == "cuda:89" and row["kernel"].split(".")[0] in ("rms_norm", "layer_norm", "swiglu", "geglu")
    ]
    assert wide and all("128" in row["loads"] and "128" in row["stores"] for row in wide)


@pytest.mark.parametrize(("capability", "expected"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)])
def test_tiles_are_multiplied_where_tensor_cores_do_it(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert multiplies_tiles(SimpleNamespace(is_cuda=True, device="cuda:0")) is expected
    assert multiplies_tiles(torch.empty(1))


@triton.jit
def _greedy(X, Y, BLOCK: tl.constexpr):
    """Holds far more than a thread has registers."""
    columns = tl.arange(0, BLOCK)
    x = tl.load(X + columns)
    tl.store(Y + columns, x * tl.sum(x))


def test_a_kernel_that_spills_is_found():
    case = Compilation(_greedy, "too much", {"X": "*fp32", "Y": "*fp32"}, {"BLOCK": 16384}, num_warps=1)
    row = aot.compile_one("greedy", case, "cuda:89")
    assert row.spills + row.stack > 0 and row.problem and "bytes of stack" in row.problem


def test_shared_memory_over_the_limit_is_found():
    row = aot.Row("k", "cuda:89", "s", {}, 4, 32, 0, 0, 100 * 1024, {}, {})
    assert row.problem == "102,400 bytes of shared memory; cuda:89 has 101,376 for a block"
    assert aot.Row("k", "cuda:90", "s", {}, 4, 32, 0, 0, 100 * 1024, {}, {}).problem is None


def test_it_refuses_the_interpreter():
    command = [sys.executable, "-m", "vlm_kernels.aot"]
    environment = child_environment(TRITON_INTERPRET="1")
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False)
    assert result.returncode == 2 and "TRITON_INTERPRET=1 is set" in result.stderr


def test_block_sizes_are_those_of_the_launchers():
    """A shape's compilation has the very constants that the launcher passes."""
    from vlm_kernels.common import row_block

    cases = list(__import__("importlib").import_module("vlm_kernels.rms_norm").compilations())
    for case in cases:
        block, warps = row_block(int(case.shape.split()[1]))
        assert case.constants["BLOCK"] == block and case.num_warps == warps
    with pytest.raises(ValueError, match="a row of 70000 elements"):
        row_block(70_000)
