"""`vlm-dist inspect`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlm_dist.cli.parsers import add_config, new_parser
from vlm_dist.errors import ConfigError
from vlm_dist.waiting import waiting

STYLES = {"supervised": "bold green", "picture": "blue", "other": "dim"}


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "inspect",
        "Show what the model will be fed: pictures as it sees them, tokens, what is learnt from; and say what looks wrong.",
        "vlm-dist inspect configs/quickstart.yaml -n 4 --html inspect.html",
    )
    add_config(parser)
    parser.add_argument("-n", type=int, default=8, metavar="N", help="rows to show (default 8)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the pictures")
    parser.add_argument("--heat", action="store_true", help="load the model and draw the norms of its vision features (on the page)")
    parser.add_argument("--json", action="store_true", help="print JSON, without the pictures")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.checking.inspection import inspect
    from vlm_dist.config_load import load_config
    from vlm_dist.reporting.inspect_page import write_inspection

    if arguments.n < 1:
        raise ConfigError(f"-n: found {arguments.n}; expected 1 or more")
    if arguments.heat and not arguments.html:
        raise ConfigError("inspect --heat: draws on the page; add --html FILE")
    with waiting("reading, encoding and looking at the first samples"):
        found = inspect(load_config(arguments.config, arguments.overrides), arguments.n, heat=arguments.heat)
    if arguments.html:
        write_inspection(found, arguments.html)
    if arguments.json:
        for sample in (sample for row in found["rows"] for sample in row):
            for picture in sample["pictures"]:
                del picture["url"]
                picture.pop("heat", None)
            for video in sample.get("videos", ()):
                video.pop("url", None)
        print(json.dumps(found, indent=1))
    else:
        _show(found)
        if arguments.html:
            print(f"page: {arguments.html}")
    return 0


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    from vlm_dist.data.tally import in_words

    console = Console(highlight=False)
    for row in found["rows"]:
        if found["packing"]:
            used = sum(sample["tokens"] for sample in row)
            console.print(f"row of {len(row)} samples, {used} of {found['max_seq_length']} tokens", style="bold")
        for sample in row:
            console.print(
                f"{sample['key']}: {sample['tokens']} tokens, {sample['picture_tokens']} of pictures, {sample['supervised']} learnt from",
                style="bold", markup=False,
            )  # fmt: skip
            line = Text()
            for part in sample["segments"]:
                text = f"<{part['of']} x {part['tokens']}>" if part["kind"] == "picture" else part["text"]
                line.append(text, STYLES[part["kind"]])
            console.print(line)
            for flag in sample["flags"]:
                console.print(f"  ! {flag}", style="red", markup=False)
    lengths = found["lengths"]
    if "median" in lengths:
        console.print(
            f"{lengths['samples']} samples measured: median {lengths['median']} tokens, 99th percentile {lengths['p99']}, "
            f"longest {lengths['longest']}; data.max_seq_length={found['max_seq_length']}"
        )
    if found["flow"]:
        console.print("through the model, the first sample:")
        for stage in found["flow"]:
            shape = " x ".join(map(str, stage["shape"]))
            console.print(f"  {stage['name']:<24} {shape:<22} {stage['module']}", markup=False)
    for line in found["weights"]:
        console.print(line, markup=False)
    for one in found["refused"][:10]:
        console.print(f"left out: {one['key']}: {one['reason']}", markup=False)
    for line in in_words(found["notes"]):
        console.print(line, markup=False)
    for flag in found["flags"]:
        console.print(f"! {flag}", style="red", markup=False)
    if not found["flags"]:
        console.print("nothing stands out", style="green")
