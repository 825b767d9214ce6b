"""The report of a run of very many steps: how long it takes to make, what it holds of memory, and how large the page is.

    python scripts/bench/report_lines.py --lines 1000000 --out docs/benchmarks/report_lines.json

The rows are those of a run, with drawn numbers. Where chromium is installed, the page is opened too, and its load event is waited for.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vlm_dist.distributed import alone
from vlm_dist.environment import describe_environment
from vlm_dist.reporting.report import render_report, write_report
from vlm_dist.reporting.thinning import Metrics
from vlm_dist.run_dir import RunDir, write_json

CONFIG = "name: many\nmodel: {name: m}\ndata: {train: x}\ntraining: {steps: 1, global_batch: 1}\n"


def write_rows(path: Path, lines: int) -> None:
    draw = random.Random(0).random
    with path.open("w") as file:
        for step in range(1, lines + 1):
            row = {
                "step": step, "loss": 2 + draw(), "lr": 1e-4, "grad_norm": draw(), "samples": 8 * step, "tokens": 900 * step,
                "label_tokens": 90 * step, "samples_per_s": 8.0, "tokens_per_s": 900 + draw(), "step_s": 1 + draw(), "data_wait_s": 0.1,
                "padding_fraction": 0.1, "peak_memory_bytes": 2**30, "imbalance": {"tokens": draw(), "patches": draw()},
                "busy_s": {"mean": draw(), "max": 1 + draw(), "slowest_rank": 0},
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")


def loaded_s(page: Path) -> float | None:
    """Seconds from the beginning to the end of the load event, in a browser; None without one."""
    from tests.browser import browser

    with browser() as driver:
        driver.get(page.as_uri())
        return driver.execute_script("const t = performance.getEntriesByType('navigation')[0]; return t.loadEventEnd") / 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = RunDir(Path(temporary) / "many")
        run.path.mkdir()
        run.config.write_text(CONFIG)
        write_rows(run.metrics, arguments.lines)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, cpu = time.monotonic(), time.process_time()
        page = write_report(run.path)
        made: dict[str, Any] = {"made_s": time.monotonic() - began, "made_cpu_s": time.process_time() - cpu}
        made["grown_bytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        made["metrics_bytes"], made["page_bytes"] = run.metrics.stat().st_size, page.stat().st_size
        known = Metrics(run.metrics).update()
        began, cpu = time.monotonic(), time.process_time()
        render_report(run.path, 10, known)
        made |= {"visit_of_watch_s": time.monotonic() - began, "visit_of_watch_cpu_s": time.process_time() - cpu}
        try:
            made["loaded_s"] = loaded_s(page)
        except Exception as error:  # no browser, or no driver for it, is installed
            made["loaded_s"], made["without_browser"] = None, str(error).splitlines()[0][:200]
    found = {
        "what": f"the report of {arguments.lines:,} steps: time to make it, memory, size, time to load it",
        "command": " ".join(["python scripts/bench/report_lines.py", *sys.argv[1:]]), "lines": arguments.lines,
        **{name: round(value, 3) if isinstance(value, float) else value for name, value in made.items()},
        "environment": describe_environment(alone()),
    }  # fmt: skip
    print(json.dumps({name: value for name, value in found.items() if name != "environment"}, indent=1))
    if arguments.out:
        write_json(arguments.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
