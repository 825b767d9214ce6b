"""A run with a fixed seed, and what every command that prints facts says of it, is what it was when fixed_run.json was written."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.house.fixed_run import fixed_run


def differences(now: Any, then: Any, where: str = "") -> list[str]:
    """Words, whole numbers, keys and their order must be the same; fractions may differ as processors' arithmetic does."""
    if isinstance(then, dict) and isinstance(now, dict):
        if list(now) != list(then):
            return [f"{where}: keys {list(now)}, were {list(then)}"]
        return [line for key in then for line in differences(now[key], then[key], f"{where}/{key}")]
    if isinstance(then, list) and isinstance(now, list) and len(now) == len(then):
        return [line for place, (a, b) in enumerate(zip(now, then, strict=True)) for line in differences(a, b, f"{where}/{place}")]
    if isinstance(then, float) and isinstance(now, float):
        same = math.isclose(now, then, rel_tol=1e-3, abs_tol=1e-4)
    else:
        same = type(now) is type(then) and now == then
    return [] if same else [f"{where}: {now!r}, was {then!r}"]


@pytest.mark.slow
def test_a_fixed_run_is_what_it_was():
    then = json.loads((ROOT / "tests" / "house" / "fixed_run.json").read_text(encoding="utf-8"))
    assert differences(fixed_run(), then) == []


def test_a_difference_is_found():
    then = {"loss": [1.0, 2.0], "name": "a", "step": 1}
    assert differences({"loss": [1.0, 2.0], "name": "a", "step": 1}, then) == []
    for other in ({"loss": [1.0, 2.1]}, {"name": "b"}, {"step": 1.0}, {"loss": [1.0]}, {"loss": None}):
        assert len(differences(then | other, then)) == 1
    assert differences({"name": "a", "loss": [1.0, 2.0], "step": 1}, then) and differences({"step": 1}, then)
