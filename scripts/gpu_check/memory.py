"""What `plan` says a step takes, what rehearsing the fullest micro-batch took, and what the training took."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

from part import Part, last_line, run
from tiny import make_inputs, settings


def shallow(part: Part) -> None:
    """A 3B with few layers: counted against measured, by the tests that hold it."""
    tests = run(
        sys.executable, "-m", "pytest", "-q", "-rP", "-m", "gpu", "-p", "no:cacheprovider", "tests/planning/test_on_gpu.py", timeout=120
    )
    part.results["plan against the card"] = re.findall(r"^.*planned .* bytes$", tests.stdout, re.MULTILINE)
    part.judge(tests.returncode == 0, "plan within 10 % of the card (four settings)", last_line(tests))


def main() -> None:
    part = Part(__doc__)
    if part.dry:
        part.find("skipped", "plan within 10 % of the card (four settings)", "needs a card")
    else:
        part.attempt("plan against the card", lambda: shallow(part))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder, ("llava",))
        tree = settings(folder, ("llava", 0, True, ""), "memory")
        tree["health"] = {"rehearse": True}
        (folder / "config.yaml").write_text(json.dumps(tree))
        command = [sys.executable, "-m", "vlm_dist.cli.main"]
        planned = run(*command, "plan", str(folder / "config.yaml"), "--json", "--quick", "--gpu", "h100")
        trained = run(*command, "train", str(folder / "config.yaml"))
        summary = folder / "runs" / "memory" / "summary.json"
        part.judge(planned.returncode == 0, "plan", last_line(planned) if planned.returncode else "made")
        part.judge(trained.returncode == 0 and summary.exists(), "training", last_line(trained))
        rehearsed = re.search(r"rehearsed the fullest micro-batch.*", trained.stdout + trained.stderr)
        part.judge(rehearsed is not None, "rehearsal", rehearsed[0] if rehearsed else "not told")
        metrics = folder / "runs" / "memory" / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        peaks = [row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row]
        if rehearsed and peaks:
            room = float(re.search(r"([\d.]+)(?: of [\d.]+)? GB", rehearsed[0])[1]) * 1e9  # type: ignore[index]
            found = f"training took {max(peaks) / 1e9:.2f} GB, the rehearsal before it {room / 1e9:.2f}"
            part.judge(max(peaks) <= 1.1 * room + 1e7, "training stays below its rehearsal", found)
        plan = json.loads(planned.stdout) if planned.returncode == 0 else {}
        part.results |= {"plan": plan, "rehearsal": rehearsed[0] if rehearsed else "", "peaks": peaks}
    part.write()


if __name__ == "__main__":
    main()
