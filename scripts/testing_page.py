"""docs/testing.md: what each minute of the suite buys, from the durations of one run of it.

scripts/test.sh --junitxml=tests.xml && python scripts/testing_page.py --junit tests.xml    # a new run: raw result and page
python scripts/testing_page.py                                                              # the page from the raw result
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RAW, OUT = ROOT / "docs" / "benchmarks" / "tests.json", ROOT / "docs" / "testing.md"
MUTATION = RAW.with_name("mutation.json")
COMMAND = "scripts/test.sh --junitxml=tests.xml && python scripts/testing_page.py --junit tests.xml"
NAMED = 12  # slowest single tests on the page
HEAD = """# Testing

Made by `python scripts/testing_page.py` from the durations of one run ([tests.json](benchmarks/tests.json)).

    scripts/test.sh                  # everything but the GPU tests: what CI runs
    scripts/test.sh --quick          # the quick ones: before a commit
    scripts/test.sh --changed        # what the files that are not committed can break, by imports, nearest first
    scripts/test.sh --changed main   # the same against a branch
    scripts/test.sh tests/data -x    # further arguments go to pytest

Every test runs on the real component: DeepSpeed engines, NF4 by bitsandbytes, tar shards, a Ray cluster, a SLURM controller, a browser.
Tiny checkpoints of the real architectures are made from their configurations, once for each worker. Processes that only stand for "another
process" are forks of a server that has the libraries imported (`tests/warm.py`); that everything also starts from nothing is what
`tests/launch` holds.
"""


def read_junit(path: Path) -> dict[str, Any]:
    """Seconds and outcomes by test file."""
    suite = next(ET.parse(path).getroot().iter("testsuite"))
    files: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for case in suite.iter("testcase"):
        file = _file_of(case.get("classname", ""))
        files[file].append((case.get("name", ""), float(case.get("time", 0))))
    rows = [{"file": file, "tests": len(tests), "seconds": round(sum(seconds for _, seconds in tests), 1)} for file, tests in files.items()]
    singles = [{"file": file, "test": name, "seconds": round(seconds, 1)} for file, tests in files.items() for name, seconds in tests]
    return {
        "command": COMMAND,
        "cores": os.cpu_count(),
        "wall_s": round(float(suite.get("time", 0)), 1),
        "outcomes": {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")},
        "files": sorted(rows, key=lambda row: -row["seconds"]),
        "slowest": sorted(singles, key=lambda row: -row["seconds"])[:NAMED],
    }


def _file_of(classname: str) -> str:
    """tests.data.test_tar or tests.data.test_tar.TestClass -> tests/data/test_tar.py"""
    parts = classname.split(".")
    while parts and not (ROOT / "/".join(parts)).with_suffix(".py").exists():
        parts.pop()
    return "/".join(parts) + ".py"


def page() -> str:
    raw = json.loads(RAW.read_text(encoding="utf-8"))
    total = sum(row["seconds"] for row in raw["files"])
    lines = [
        HEAD,
        "## What each minute buys",
        "",
        f"{raw['outcomes']['tests']:,} tests{_took(raw)}, of which {raw['outcomes']['skipped']} were skipped with their reason; "
        f"{total / 60:.0f} minutes of tests in all.",
        *([raw["note"]] if "note" in raw else []),
        "",
        "| seconds | tests | file | what it holds |",
        "|---:|---:|---|---|",
        *(f"| {row['seconds']:.0f} | {row['tests']} | `{row['file']}` | {_holds(row['file'])} |" for row in raw["files"]),
        "",
        "The slowest single tests:",
        "",
        "| seconds | test |",
        "|---:|---|",
        *(f"| {row['seconds']:.0f} | `{row['file']}::{row['test']}` |" for row in raw["slowest"]),
    ]
    return "\n".join(lines + _mutation()) + "\n"


def _holds(file: str) -> str:
    """The first line of a test file's docstring."""
    words = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) if (ROOT / file).exists() else ""
    return (words or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def _mutation() -> list[str]:
    """Whether the tests would notice a silent error where it costs most."""
    if not MUTATION.exists():
        return []
    raw = json.loads(MUTATION.read_text(encoding="utf-8"))
    rows = raw["files"]
    killed, made = sum(row["killed"] + row["timeout"] for row in rows), sum(row["mutants"] for row in rows)
    return [
        "",
        "## Would the tests notice?",
        "",
        f"In the code where a silent error costs most, {made:,} small faults were made one by one (`{raw['command']}`;",
        f"[mutation.json](benchmarks/mutation.json)); the tests noticed {killed:,}, {killed / made:.1%}.",
        "Those that they did not notice stand in the raw result, with the reason why they stay; those without a reason are open work.",
        "",
        "| file | faults | noticed | not noticed | explained |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| `{row['file']}` | {row['mutants']} | {row['killed'] + row['timeout']} | {row['survived']} | {_explained(row)} |"
            for row in rows
        ),
    ]


def _took(raw: dict[str, Any]) -> str:
    return f" in {raw['wall_s'] / 60:.1f} minutes on {raw['cores']} cores" if raw["wall_s"] else ""


def _explained(row: dict[str, Any]) -> int:
    return sum(bool(one["why"]) for one in row["explained"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path, help="the JUnit XML of a whole run")
    if (junit := parser.parse_args().junit) is not None:
        RAW.write_text(json.dumps(read_junit(junit), indent=1) + "\n", encoding="utf-8")
    OUT.write_text(page(), encoding="utf-8")
    print(OUT.name)


if __name__ == "__main__":
    main()
