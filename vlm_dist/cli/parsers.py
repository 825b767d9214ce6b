"""What the subcommands' parsers share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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


def add_base_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-model", metavar="FOLDER", help="where an adapter's base is now, if not where the adapter's files say")


def add_system(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--system", metavar="TEXT", help="the system prompt (default: that of the training, where all samples had the same; '': none)"
    )
    parser.add_argument(
        "--reasoning",
        action="store_true",
        help="let the model think first (default: it answers at once, where its chat template can tell it)",
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Like `parse_args`, and takes overrides and --debug wherever they stand: argparse alone wants all overrides in one place."""
    arguments, rest = parser.parse_known_args(argv)
    arguments.debug = arguments.debug or "--debug" in rest
    rest = [word for word in rest if word != "--debug"]
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if overrides != rest or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *overrides]
    return arguments
