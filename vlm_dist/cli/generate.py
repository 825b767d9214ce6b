"""`vlm-dist generate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlm_dist.cli.parsers import add_base_model, add_system, new_parser


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "generate",
        "Ask a trained model about a picture.",
        'vlm-dist generate runs/quickstart --image photo.jpg --prompt "What colour is the circle?"',
    )
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="a run directory, an adapter folder, a checkpoint folder or a hub id")
    add_base_model(parser)
    add_system(parser)
    parser.add_argument("--image", type=Path, action="append", default=[], help="a JPEG, PNG or WebP file; may be given several times")
    parser.add_argument("--prompt", required=True, help="what to ask")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--base", action="store_true", help="leave the run's adapter off: the answer before training")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.serving.answer import answer

    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "base_model": arguments.base_model,
        "system": arguments.system,
        "reasoning": arguments.reasoning,
    }
    text = answer(arguments.source, arguments.image, arguments.prompt, base=arguments.base, **options)
    if arguments.json:
        print(json.dumps({"prompt": arguments.prompt, "images": [str(path) for path in arguments.image], "answer": text}))
    else:
        print(text)
    return 0
