"""`vlm-dist export`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_dist.cli.parsers import add_base_model, new_parser


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "export",
        "Write a run's result, or any adapter, for use elsewhere: as it is, or as one merged checkpoint that transformers and vLLM load.",
        "vlm-dist export runs/quickstart --to merged-16bit --out models/quickstart",
    )
    parser.add_argument("source", metavar="RUN_OR_ADAPTER", type=Path, help="a run directory or an adapter folder")
    add_base_model(parser)
    parser.add_argument(
        "--to", required=True, choices=("adapter", "merged-16bit"), help="the adapter alone, or base and adapter as one model"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="default: RUN/export/adapter or RUN/export/merged-16bit; of an adapter folder that is of no run: ADAPTER-merged-16bit",
    )
    parser.add_argument(
        "--onto",
        choices=("original", "dequantised"),
        help="merge onto the base's own 16-bit weights (default where it has them), or onto the NF4 ones that the adapter was trained on",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="number type of a merged model (default auto: the base's own 16-bit type); float32 takes twice the room and loses nothing",
    )
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="held-out samples to compare on (default 8)")
    parser.add_argument("--push", metavar="USER/NAME", help="then upload it to this repository of the Hugging Face hub")
    parser.add_argument("--public", action="store_true", help="with --push: a repository that is made is public (default: private)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.serving.export import export_run, push_folder

    options = {"onto": arguments.onto, "samples": arguments.samples, "dtype": arguments.dtype, "base_model": arguments.base_model}
    result = export_run(arguments.source, arguments.to, arguments.out, **options)
    if result.warning:
        print(f"note: {result.warning}", file=sys.stderr)
    pushed = push_folder(result.out, arguments.push, private=not arguments.public) if arguments.push else ""
    if arguments.json:
        comparison = asdict(result.comparison) if result.comparison else None
        print(json.dumps({"out": str(result.out), "comparison": comparison, "warning": result.warning, "pushed": pushed}))
        return 0
    if result.comparison:
        print(result.comparison, file=sys.stderr if result.comparison.is_worse else sys.stdout)
    print(f"written: {result.out}")
    if pushed:
        print(f"uploaded: {pushed}")
    return 0
