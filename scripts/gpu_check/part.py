"""What every part of scripts/gpu_check.sh writes: its findings, on which machine, by which command."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "bitsandbytes", "peft", "accelerate", "trl", "liger-kernel", "unsloth")
PEERS = {"trl": "trl", "liger": "liger_kernel", "unsloth": "unsloth"}


class LeftOut(Exception):
    """Why something is not measured here."""


class Part:
    """One part: `right`, `wrong`, `slow` and `skipped` findings, and whatever it measured."""

    def __init__(self, about: str | None, argv: Sequence[str] | None = None):
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
        parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, no claim")
        parser.add_argument("--budget", type=float, default=math.inf, help="seconds; what does not fit is told")
        self.arguments = parser.parse_args(argv)
        self.dry: bool = self.arguments.dry_run
        self.checks: list[dict[str, str]] = []
        self.results: dict[str, Any] = {}
        self.tracebacks: dict[str, str] = {}
        self._begun = time.monotonic()

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def has_time(self) -> bool:
        return time.monotonic() - self._begun < self.arguments.budget

    def find(self, verdict: str, name: str, found: object) -> None:
        self.checks.append({"verdict": verdict, "name": name, "found": str(found)})
        self._write(unfinished=True)  # what is known is kept, whatever ends this part
        print(f"{verdict:8} {name}: {found}", flush=True)

    def judge(self, good: bool, name: str, found: object, otherwise: str = "wrong") -> None:
        self.find("right" if good else otherwise, name, found)

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """What `call` gives; what it dies of is a finding, and the part goes on."""
        if not self.has_time:
            return self.find("skipped", name, "no time left in this part")
        try:
            return call()
        except LeftOut as why:
            return self.find("skipped", name, why)
        except Exception as error:
            said = str(error).strip().splitlines()
            self.tracebacks[name] = traceback.format_exc(limit=-12)
            return self.find("wrong", name, f"{type(error).__name__}: {said[0][:200] if said else ''}")

    def write(self) -> None:
        self._write()

    def _write(self, **more: bool) -> None:
        content = {
            "part": Path(sys.argv[0]).stem, "command": shlex.join(["python", *sys.argv]), "dry_run": self.dry,
            "machine": describe_machine(),
            "seconds": round(time.monotonic() - self._begun, 1), "checks": self.checks, "results": self.results,
            "tracebacks": self.tracebacks, **more,
        }  # fmt: skip
        self.arguments.out.parent.mkdir(parents=True, exist_ok=True)
        self.arguments.out.write_text(without_places(json.dumps(content, indent=1, default=str)) + "\n")


def without_places(text: str) -> str:
    """Without where this machine keeps the checkout and its packages."""
    for place in sorted({str(ROOT), *filter(os.path.isabs, sys.path)}, key=len, reverse=True):
        text = text.replace(place + os.sep, "").replace(place, ".")
    return text


@functools.cache
def describe_machine() -> dict[str, Any]:
    """GPU, driver, versions."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    smi = subprocess.run(query, capture_output=True, text=True, check=False).stdout if shutil.which("nvidia-smi") else ""
    versions = {name: version for name in PACKAGES if (version := version_of(name))}
    return {"gpus": smi.strip().splitlines(), "python": platform.python_version(), "system": platform.platform(), "versions": versions}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(*command: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in the repository, its output kept; exit code 124 where it ran past `timeout` seconds."""
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, env={**os.environ, **environment}
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[-1]}: stopped after {timeout:.0f} s")


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (result.stdout + result.stderr).strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit code {result.returncode}, no output"


def median_ms(call: Callable[[], Any], device: str, rounds: int) -> float:
    """Median milliseconds of `call` on the device, after two calls that do not count."""
    import torch

    times = []
    for number in range(rounds + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times += [1000 * (time.perf_counter() - begun)] if number >= 2 else []
    return statistics.median(times)
