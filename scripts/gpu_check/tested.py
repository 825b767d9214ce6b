"""Every kernel against its meaning in float64 on this card (pytest -m gpu), and the loss kernel looked at for races."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys

from part import Part, last_line, run

SELECTED = {False: ("-m", "gpu"), True: ("-m", "not gpu", "-k", "swiglu")}


def main() -> None:
    part = Part(__doc__)
    beside = ("-n", "4") if not part.dry and importlib.util.find_spec("xdist") else ()  # most of the time goes into compiling
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *beside,
        "tests/kernels/test_kernels.py",
        *SELECTED[part.dry],
    )
    tests = run(*command, timeout=180)
    failed = re.findall(r"^FAILED (\S+)", tests.stdout, re.MULTILINE)
    passed = int((re.search(r"(\d+) passed", tests.stdout) or [0, 0])[1])
    summary = re.search(r"^.*\d+ (?:passed|failed|error).*$", tests.stdout, re.MULTILINE)
    part.judge(tests.returncode == 0 and passed > 0, "kernels against float64", summary[0].strip("= ") if summary else last_line(tests))
    part.results["tests"] = {"passed": passed, "failed": failed, "command": " ".join(command[1:])}
    for name in failed[:10]:
        part.find("wrong", "kernel", name)
    part.attempt("loss, again and again", lambda: repeated(part))
    sanitizer = shutil.which("compute-sanitizer")
    if part.dry or sanitizer is None:
        part.find("skipped", "racecheck of the loss", "no compute-sanitizer" if sanitizer is None else "needs a card")
    else:
        for tool in ("racecheck", "memcheck"):
            checked = run(sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", ONCE, timeout=60)
            part.judge(checked.returncode == 0, f"{tool} of the loss", last_line(checked))
    part.write()


ONCE = """
import torch, vlm_kernels
h = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
w = torch.randn(4097, 64, device="cuda", dtype=torch.bfloat16)
vlm_kernels.linear_cross_entropy(h, w, torch.arange(8, device="cuda"))[0].backward()
"""


def repeated(part: Part) -> None:
    """racecheck sees shared memory only: a race in global memory shows as a loss that is not always the same."""
    import torch

    import vlm_kernels

    rows, vocabulary, times = (8, 97, 3) if part.dry else (1024, 151_936, 100)
    torch.manual_seed(0)
    hidden = torch.randn(rows, 64, device=part.device, requires_grad=True)
    weight = torch.randn(vocabulary, 64, device=part.device) * 0.1
    labels = torch.randint(vocabulary, (rows,), device=part.device)
    expected = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum").item()
    losses = [vlm_kernels.linear_cross_entropy(hidden, weight, labels)[0].item() for _ in range(times)]
    good = max(losses) == min(losses) and abs(losses[0] / expected - 1) < 1e-3  # TF32 may be on
    part.judge(good, "loss, again and again", f"{times} times {min(losses):.6g} to {max(losses):.6g}, in float64 {expected:.6g}")


if __name__ == "__main__":
    main()
