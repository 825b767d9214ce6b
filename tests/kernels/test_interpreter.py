"""The kernels themselves, run by Triton's interpreter: the variable must be set before Triton is imported, so in another process."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.conftest import ROOT, child_environment


def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "tests/kernels/test_kernels.py"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=child_environment(TRITON_INTERPRET="1"), timeout=900, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 300
