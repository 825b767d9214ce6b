"""`vlm-dist doctor`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vlm_dist.cli.parsers import new_parser
from vlm_dist.errors import MachineError

SIGNS = {"ok": ("green", "ok"), "warn": ("yellow", "look"), "bad": ("red", "BAD")}


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "doctor",
        "Check this machine: packages, GPUs, memory, disk, network, and with a configuration the speed of its data; each with a fix.",
        "vlm-dist doctor configs/quickstart.yaml",
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="check its data and output folder too")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides such as output_dir=/scratch/runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.checking.doctor import examine
    from vlm_dist.config_load import load_config

    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    checks = []
    for check in examine(config):
        checks.append(check)
        if not arguments.json:
            show(check)
    bad = sum(check.state == "bad" for check in checks)
    if arguments.json:
        print(json.dumps({"fit": not bad, "checks": [check.to_dict() for check in checks]}, indent=1))
    else:
        looks = sum(check.state == "warn" for check in checks)
        print(f"{'not fit to train' if bad else 'fit to train'}: {bad} bad, {looks} to look at, of {len(checks)} checks")
    return MachineError.exit_code if bad else 0


def show(check: Any) -> None:
    """Print a finding."""
    from rich.console import Console

    colour, word = SIGNS[check.state]
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[{colour}]{word:>4}[/]  {check.name:<13} ", end="")
    console.print(check.found, markup=False)
    if check.fix:
        console.print(f"{'':20}-> {check.fix}", markup=False)
