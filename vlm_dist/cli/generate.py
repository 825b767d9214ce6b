"""`vlm-dist generate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlm_dist.cli.parsers import add_base_model, add_system, new_parser
from vlm_dist.errors import ConfigError, DataError


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "generate",
        "Ask a trained model about a picture or video.",
        'vlm-dist generate runs/quickstart --image photo.jpg --prompt "What colour is the circle?"',
    )
    parser.add_argument("source", metavar="RUN_OR_MODEL", help="a run directory, an adapter folder, a checkpoint folder or a hub id")
    add_base_model(parser)
    add_system(parser)
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        help="a JPEG, PNG or WebP file, or an http(s) address; may be given several times",
    )
    parser.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="an mp4, mov, webm, mkv, avi or gif file, or an address; several likewise",
    )
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="ask about each picture in it, one after another, and print a line of JSON for each"
    )
    parser.add_argument("--prompt", required=True, help="what to ask")
    parser.add_argument("--temperature", type=float, metavar="T", help="draw the words, the bolder the higher (default: the likeliest)")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest words of this probability together")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--base", action="store_true", help="leave the run's adapter off: the answer before training")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.serving.answer import answers, pictures_of, sampling

    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens: found {arguments.max_new_tokens}; expected 1 or more")
    other = next((name for name in ("image", "video") if getattr(arguments, name)), None)
    if arguments.folder is not None and other:
        raise ConfigError(f"generate: --{other} and --folder are given; give one of them")
    asked = [[str(path)] for path in pictures_of(arguments.folder)] if arguments.folder is not None else [arguments.image]
    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "base": arguments.base,
        "base_model": arguments.base_model,
        "system": arguments.system,
        "reasoning": arguments.reasoning,
        "videos": arguments.video,
        "sampling": sampling(arguments.temperature, arguments.top_p, arguments.seed),
    }
    failed = 0
    of_folder = arguments.folder is not None
    for images, text in zip(asked, answers(arguments.source, asked, arguments.prompt, **options, go_on=of_folder), strict=True):
        if isinstance(text, DataError):
            failed += 1
            print(json.dumps({"prompt": arguments.prompt, "images": images, "error": str(text).removeprefix("--image: ")}), flush=True)
        elif arguments.json or of_folder:
            videos = {"videos": arguments.video} if arguments.video else {}
            print(json.dumps({"prompt": arguments.prompt, "images": images, **videos, "answer": text}), flush=True)
        else:
            print(text)
    if failed:
        raise DataError(f"--folder: {failed} of {len(asked)} pictures cannot be read; their lines have an error in place of an answer")
    return 0
