"""The tables of docs/reliability.md, from tests/faults/rows.yaml and, for the time to recover, docs/benchmarks/chaos.json.

python scripts/faults_table.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
PAGE, ROWS, CHAOS = ROOT / "docs" / "reliability.md", ROOT / "tests" / "faults" / "rows.yaml", ROOT / "docs" / "benchmarks" / "chaos.json"
BEGIN, END = "<!-- faults: python scripts/faults_table.py -->", "<!-- /faults -->"
HEAD = ["| fault | how it is made | what a user sees | exit code | what is lost | test |", "|---|---|---|---|---|---|"]


def read_rows() -> dict[str, list[dict[str, Any]]]:
    """By part of the page."""
    return YAML(typ="safe", pure=True).load(ROWS.read_text(encoding="utf-8"))


def recovery(row: dict[str, Any]) -> str:
    """How long it took until training went on, where it was measured."""
    if row.get("recovery") != "chaos":
        return ""
    found = json.loads(CHAOS.read_text(encoding="utf-8"))
    again = found["recovery_s"][1:]
    return (
        f". Measured: the next step {statistics.median(again):.0f} s after the start (median of {len(again)}, all loading included), "
        f"{found['steps_lost'] / max(1, len(again)):.0f} steps lost at each"
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = list(HEAD)
    for row in rows:
        tests = "<br>".join(f"`{name.partition('::')[0]}`: {name.partition('::')[2].removeprefix('test_')}" for name in row["tests"])
        cells = [row["fault"], row["made"], row["seen"], str(row["code"]), row["lost"] + recovery(row), tests]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def rendered(page: str) -> str:
    """The page with its tables made anew."""
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    parts = [line for title, rows in read_rows().items() for line in [f"### {title}", "", *table(rows), ""]]
    return page[:begin] + "\n\n" + "\n".join(parts) + page[end:]


def main() -> None:
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
