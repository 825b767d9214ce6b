"""What the subcommands' parsers share."""

from __future__ import annotations

import argparse
from typing import Any


def new_parser(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A subcommand's parser: one-line summary, and an example at the end of its help."""
    return commands.add_parser(
        name, help=summary, description=summary, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG and dotted overrides."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML configuration")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides such as optim.lr=2e-4")
