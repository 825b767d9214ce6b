"""DeepSpeed chooses a device once for its process: here the real one, before the first card is pretended, or later tests would be on it."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _the_real_device():
    from deepspeed.accelerator import get_accelerator

    assert get_accelerator().device_name() in ("cpu", "cuda")
