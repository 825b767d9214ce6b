"""Driver, compiler, Python's headers (Triton compiles its launcher with both), needed packages, and `vlm-dist doctor`."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import sysconfig
from pathlib import Path

from part import PEERS, Part, last_line, run

NEEDED = ("torch", "triton", "transformers", "deepspeed", "bitsandbytes", "peft", "webdataset", "pydantic", "ruamel.yaml", "jinja2", "PIL",
          "simplejpeg")  # fmt: skip


def has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    part = Part(__doc__)
    missing = [module for module in NEEDED if not has(module)]
    part.judge(not missing, "packages", f"missing: {', '.join(missing)}" if missing else "all that training needs")
    for peer, module in PEERS.items():
        part.find("right" if has(module) else "skipped", f"peer {peer}", "importable" if has(module) else "not installed: not compared")
    compiler = shutil.which("gcc") or shutil.which("cc")
    part.judge(compiler is not None, "gcc", compiler or "none: Triton cannot compile its launcher; apt-get install gcc")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    part.judge(header.exists(), "Python.h", header if header.exists() else f"{header} is missing; apt-get install python3-dev")
    if not part.dry:
        driver = run("nvidia-smi")
        part.judge(driver.returncode == 0, "driver", next((line.strip("| ") for line in driver.stdout.splitlines() if "CUDA" in line), "?"))
        part.attempt("CUDA starts", lambda: part.find("right", "CUDA starts", started()))
    doctor = run(sys.executable, "-m", "vlm_dist.cli.main", "doctor", "--json", timeout=120)
    try:
        checks = json.loads(doctor.stdout)
    except ValueError:
        part.find("wrong", "doctor", last_line(doctor))
    else:
        checks = checks["checks"] if isinstance(checks, dict) else checks
        part.results["doctor"] = checks
        for check in checks:
            if check["state"] != "ok":
                part.find("wrong" if check["state"] == "bad" else "slow", f"doctor: {check['name']}", check["found"])
    part.write()


def started() -> str:
    import torch

    assert torch.ones(1 << 20, device="cuda").sum().item() == 1 << 20
    card = f"{torch.cuda.get_device_name()}, capability {torch.cuda.get_device_capability()}"
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {card}"


if __name__ == "__main__":
    main()
