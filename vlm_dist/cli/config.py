"""`vlm-dist config`."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from vlm_dist.cli.parsers import new_parser
from vlm_dist.config_load import dump_config, explain, json_schema, load_config


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands, "config", "Explain every setting, print the JSON schema, or resolve a configuration.", "vlm-dist config --explain"
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="print this configuration with every default filled in")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides such as optim.lr=2e-4")
    parser.add_argument("--explain", action="store_true", help="every setting: type, default, meaning")
    parser.add_argument("--markdown", action="store_true", help="the same as a page (docs/configuration.md)")
    parser.add_argument("--schema", action="store_true", help="JSON schema, for editors")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        print(json.dumps(json_schema(), indent=1))
    elif arguments.explain:
        _explain()
    elif arguments.markdown:
        print(reference(), end="")
    elif arguments.config:
        print(dump_config(load_config(arguments.config, arguments.overrides)), end="")
    else:
        arguments.parser.error("give --explain, --markdown, --schema, or a CONFIG")
    return 0


def _explain() -> None:
    for key, kind, default, meaning in explain():
        if kind == "section":
            print(f"\n{key}: {meaning}")
        else:
            print(f"  {key}  ({kind}; default {default})\n{textwrap.indent(meaning, ' ' * 6)}")


def reference() -> str:
    """Every setting as one Markdown page."""
    lines = [
        "# Every setting",
        "",
        "Made from the code: `vlm-dist config --markdown > docs/configuration.md`. `vlm-dist config --explain` prints the same, and",
        "`vlm-dist config --schema` a JSON schema for editors.",
    ]
    sections: dict[str, list[str]] = {"": ["", "| setting | type | default | meaning |", "|---|---|---|---|"]}
    for key, kind, default, meaning in explain():
        meaning, kind = (" ".join(text.split()).replace("|", "\\|") for text in (meaning, kind))
        if kind == "section":
            sections[key] = ["", f"## {key}", "", meaning, "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        else:
            shown = default if default == "required" else f"`{default}`"
            sections[key.rpartition(".")[0]].append(f"| `{key}` | {kind} | {shown} | {meaning} |")
    return "\n".join([*lines, *(line for rows in sections.values() for line in rows)]) + "\n"
