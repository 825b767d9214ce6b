"""`vlm-dist report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm_dist.cli.parsers import new_parser


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "report",
        "Write one self-contained page about a run: curves, and held-out answers before and after.",
        "vlm-dist report runs/quickstart",
    )
    parser.add_argument("run_dir", metavar="RUN", type=Path)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.reporting.report import write_report

    print(write_report(arguments.run_dir))
    return 0
