"""Headless Chromium, driven by its own driver."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking", "no-first-run")


@contextmanager
def browser(width: int = 1200, *, dark: bool = False) -> Iterator[Any]:
    """A window of this width; skips the test where Chromium is not installed."""
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed (scripts/test.sh installs it as root)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield driver
    finally:
        driver.quit()


def errors_of(driver: Any) -> list[str]:
    """What the page's own console calls an error."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
