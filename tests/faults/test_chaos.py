"""scripts/chaos.py, shortened: a run that is killed and slowed, on a server that fails, ends as one that is left alone."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys

import pytest

from tests.conftest import ROOT, child_environment
from tests.warm import Warm


def chaos():
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "scripts" / "chaos.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module
    spec.loader.exec_module(module)
    return module


class Started(Warm):
    """With what chaos asks of a process."""

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float) -> None:
        self.communicate(timeout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_chaos_ends_as_an_undisturbed_run(tmp_path, monkeypatch):
    module = chaos()

    def start(self, ranks: int) -> Started:
        self.starts += 1
        process = Started(["--config", str(self.config)], child_environment(), script=str(ROOT / "launch" / "train.py"), merged=True)
        os.symlink(process._out, self.log)
        return process

    monkeypatch.setattr(module.Run, "start", start)
    words = ["--steps", "40", "--faults", "3", "--ranks", "1", "--seed", "5", "--out", str(tmp_path / "chaos.json")]
    monkeypatch.setattr(sys, "argv", ["scripts/chaos.py", *words])
    assert module.main() == 0
    found = json.loads((tmp_path / "chaos.json").read_text())
    assert found["disturbed"] and found["starts"] >= 2 and found["server"]["503"] > 0
    assert found["difference"]["same_steps"] and 0 < found["goodput"] <= found["calm"]["goodput"] * 1.5
