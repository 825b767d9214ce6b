"""docs/cli.md, made from the argument parsers of `vlm-dist`.

python scripts/cli_page.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from vlm_dist.cli.main import build_parser

OUT = Path(__file__).resolve().parent.parent / "docs" / "cli.md"


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all commands that can be run."""
    for command in subcommands(parser).values():
        yield from leaves(command) if subcommands(command) else [command]


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def spelled(action: argparse.Action) -> str:
    """An argument as one writes it: `CONFIG`, `--gpus N`."""
    name = action.metavar if isinstance(action.metavar, str) else (action.dest if not action.option_strings else action.dest.upper())
    values = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else name
    if action.nargs in ("*", "+"):
        values += " ..."
    takes_none = action.option_strings and action.nargs == 0
    return ", ".join(f"`{option}`" if takes_none else f"`{option} {values}`" for option in action.option_strings or [""]).replace("` ", "`")


def meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    words = parser._get_formatter()._expand_help(action) if action.help else ""
    default = " ".join(action.default) if isinstance(action.default, list | tuple) else action.default
    shown = action.default not in (None, argparse.SUPPRESS, []) and action.nargs != 0 and action.option_strings and "default" not in words
    return cell(words + (f" (default {default})" if shown else ""))


def section(parser: argparse.ArgumentParser) -> list[str]:
    actions = [action for action in parser._actions if action.help is not argparse.SUPPRESS and action.dest != "help"]
    lines = ["", f"## {parser.prog}", "", parser.description or ""]
    if actions:
        lines += ["", "| argument | meaning |", "|---|---|"]
        lines += [f"| {spelled(action)}{'' if needed(action) else ' *(optional)*'} | {meaning(action, parser)} |" for action in actions]
    examples = [line.strip() for line in (parser.epilog or "").splitlines()[1:] if line.strip()]
    return [*lines, *(["", *(f"    {line}" for line in examples)] if examples else [])]


def needed(action: argparse.Action) -> bool:
    """An option shows by its dashes that it may be left out."""
    return bool(action.option_strings) or action.nargs not in ("?", "*")


def page() -> str:
    parser = build_parser()
    summary = [line for line in (parser.description or "").splitlines()[1:] if line.strip()]
    return "\n".join([
        "# Every command",
        "",
        "Made from the code: `python scripts/cli_page.py`. `vlm-dist COMMAND --help` prints the same.",
        "",
        "```text",
        *summary,
        "```",
        "",
        "`--debug` with any of them shows the traceback of an error; overrides such as `optim.lr=2e-4` may stand anywhere after CONFIG.",
        "[What the exit codes mean](training.md#stopping-and-continuing).",
        *(line for command in leaves(parser) for line in section(command)),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    OUT.write_text(page(), encoding="utf-8")
    print(OUT.name)
