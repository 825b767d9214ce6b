"""`vlm-dist eval`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vlm_dist.cli.parsers import add_base_model, new_parser


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "eval",
        "Score a finished run, an adapter or a checkpoint on held-out shards.",
        "vlm-dist eval runs/quickstart --data 'data/synthetic/qa-heldout-*.tar'",
    )
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="a run directory, an adapter folder, a checkpoint folder or a hub id")
    add_base_model(parser)
    parser.add_argument("--data", nargs="+", help="shards to score on (default: those of the run's data.heldout)")
    parser.add_argument("--samples", type=int, metavar="N", help="use N samples, spread over the shards (default: all)")
    parser.add_argument("--base", action="store_true", help="leave the adapter off: the score before training")
    parser.add_argument(
        "--without-pictures",
        action=argparse.BooleanOptionalAction,
        help="ask the questions with greyed pictures too: what of the score needs eyes (default: as evaluation.without_pictures says)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, among_ranks=True)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.scoring.score import score_run
    from vlm_dist.scoring.without_pictures import without_pictures_in_words

    options = {"data": arguments.data, "samples": arguments.samples, "base": arguments.base, "base_model": arguments.base_model}
    options["without_pictures"] = arguments.without_pictures
    scores = score_run(arguments.source, **options)
    if arguments.json:
        print(json.dumps(scores, indent=1))
    else:
        print(f"exact match {scores['exact_match']:.1%} of {scores['samples']} held-out samples")
        if (blind := scores.get("without_pictures")) is not None:
            print(without_pictures_in_words(blind))
        for kind, share in scores["by_kind"].items():
            print(f"  {kind:12} {share:.1%}")
    return 0
