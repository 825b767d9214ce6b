"""`vlm-dist data ...`."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from vlm_dist.cli.data_check import add_index, add_order, add_verify
from vlm_dist.cli.parsers import new_parser
from vlm_dist.errors import DataError

TASKS = ("caption", "qa", "reading")
ALL_TASKS = (*TASKS, "boxes", "video")


def add_parser(commands: Any) -> None:
    parser = new_parser(commands, "data", "Make and check image-text shards.", "vlm-dist data synth data/synthetic")
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    synth = new_parser(
        kinds,
        "synth",
        "Make a synthetic data set with exact answers: coloured shapes to describe, ask about, find and watch, and short texts to read.",
        "vlm-dist data synth data/synthetic --train 4000 --heldout 200 --tasks caption qa",
    )
    synth.add_argument("out", metavar="FOLDER", type=Path, help="where the shards go")
    synth.add_argument("--train", type=int, default=8000, metavar="N", help="training samples a task (default 8000)")
    synth.add_argument("--heldout", type=int, default=200, metavar="N", help="held-out samples a task (default 200)")
    synth.add_argument("--tasks", nargs="+", choices=ALL_TASKS, default=list(TASKS), help="what to make (default: all but boxes and video)")
    synth.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default 0)")
    synth.add_argument("--size", type=int, default=64, metavar="PIXELS", help="side of the pictures (default 64)")
    synth.add_argument("--format", choices=("jpg", "png", "webp"), default="jpg", help="of the pictures (default jpg)")
    synth.add_argument("--shard-size", type=int, default=1000, metavar="N", help="samples a shard (default 1000)")
    synth.add_argument("--questions", type=int, default=3, metavar="N", help="most questions a training picture of task qa (default 3)")
    synth.set_defaults(run=run_synth)
    _add_pack(kinds)
    add_index(kinds)
    add_verify(kinds)
    add_order(kinds)


def _add_pack(kinds: Any) -> None:
    pack = new_parser(
        kinds,
        "pack",
        "Write a data set that you have as tar shards.",
        "vlm-dist data pack llava_instruct_150k.json data/llava --images coco/train2017 --heldout 500",
    )
    pack.add_argument(
        "source",
        metavar="SOURCE",
        help="records: JSON, JSON lines, CSV, TSV or Parquet, or a glob of them, in any layout of docs/data.md; COCO's JSON; a folder of "
        "pictures with NAME.txt, metadata.jsonl or metadata.csv, or in folders named by class; tars that others made ('cc3m/*.tar'); a "
        "Hugging Face data set (saved to a folder, or a hub id). flickr8k: a hub id, or a folder of parquet files or with captions.txt",
    )
    pack.add_argument("out", metavar="FOLDER", type=Path, help="where the shards go")
    pack.add_argument(
        "--format", choices=("records", "flickr8k"), default="records", help="default records; flickr8k: pictures with five captions each"
    )
    pack.add_argument(
        "--images", type=Path, metavar="FOLDER", help="records: where paths of pictures and videos begin (default: beside SOURCE)"
    )
    pack.add_argument(
        "--split",
        metavar="NAME",
        help="records: of a Hugging Face data set or a folder with several (default train), or of records with a key `split` (default all)",
    )
    pack.add_argument("--annotations", metavar="FILE", help="records: the answers to SOURCE's questions, where VQA's are two files")
    pack.add_argument("--question", metavar="COLUMN", help="records: the key of the question (default: recognised)")
    pack.add_argument("--answer", metavar="COLUMN", help="records: the key of the answer, or without --question of the caption")
    pack.add_argument("--image", metavar="COLUMN", help="records: the key of the picture or pictures")
    numbers = "records: what the numbers of boxes and points mean: xywh (COCO's), xyxy, cxcywh, xy; xyxy/1000 and its like: shares"
    pack.add_argument("--boxes", metavar="FORM", help=numbers)
    options = "records: what the first option's number is, where answers are numbers of options (default 0, unless none is 0)"
    pack.add_argument("--options-from", type=int, choices=(0, 1), help=options)
    pack.add_argument("--fetch", action="store_true", help="records: fetch pictures at http(s) addresses (default: named, not fetched)")
    pack.add_argument("--fetch-private", action="store_true", help="as --fetch, also from this machine and private networks")
    pack.add_argument("--dry-run", action="store_true", help="records: show the layout recognised and one sample; write nothing")
    pack.add_argument("--max-side", type=int, metavar="PIXELS", help="records: make larger pictures smaller (default: as they are)")
    pack.add_argument("--reencode", choices=("jpg", "png", "webp"), help="records: encode all pictures anew (default: as they are)")
    pack.add_argument("--quality", type=int, default=90, help="records: of what is encoded anew (default 90)")
    pack.add_argument("--processes", type=int, metavar="N", help="records: shards written at a time (default: one per CPU)")
    pack.add_argument("--limit", type=int, metavar="N", help="keep N training samples, drawn by --seed (default: all)")
    apart = "samples kept apart, those of one picture together, told by its pixels (default 0; flickr8k: 1000 pictures)"
    pack.add_argument("--heldout", type=int, metavar="N", help=apart)
    alike = "records: pictures that look alike are one picture, and a record that says what an earlier one says of it is left out"
    pack.add_argument("--dedup", action="store_true", help=alike)
    pack.add_argument("--shard-size", type=int, default=1000, metavar="N", help="samples a shard (default 1000)")
    pack.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    pack.set_defaults(run=run_pack)


def run_synth(arguments: argparse.Namespace) -> int:
    from vlm_dist.data.synthetic import synthesise

    _check_positive(arguments, "train", "heldout", "size", "shard_size", "questions")
    made = synthesise(
        arguments.out,
        train=arguments.train,
        heldout=arguments.heldout,
        tasks=tuple(arguments.tasks),
        seed=arguments.seed,
        size=arguments.size,
        image_format=arguments.format,
        shard_size=arguments.shard_size,
        questions_per_picture=arguments.questions,
    )
    _index([shard for shards in made.values() for shard in shards])
    for name, shards in made.items():
        print(f"{name:16} {len(shards)} shards  {shards[0]}{' ...' if len(shards) > 1 else ''}")
    return 0


def run_pack(arguments: argparse.Namespace) -> int:
    from vlm_dist.data.pack import pack_flickr8k
    from vlm_dist.data.pack_pictures import in_words
    from vlm_dist.data.pack_records import LEFT_OUT, pack_records

    if arguments.heldout is not None and arguments.heldout < 0:
        raise DataError(f"--heldout: found {arguments.heldout}; expected 0 or more")
    given = (name for name in ("limit", "max_side", "processes") if getattr(arguments, name) is not None)
    _check_positive(arguments, "shard_size", "quality", *given)
    options: dict[str, Any] = {"samples_per_shard": arguments.shard_size, "limit": arguments.limit, "seed": arguments.seed}
    if arguments.heldout is not None:
        options["heldout"] = arguments.heldout
    if arguments.format == "flickr8k":
        of_records = ("dedup", "dry_run", "annotations", "question", "answer", "image", "boxes", "options_from", "fetch", "fetch_private")
        _refuse(arguments, *of_records)
        made: dict[str, Any] = dict(pack_flickr8k(arguments.source, arguments.out, **options))
    else:
        names = ("images", "split", "annotations", "dedup", "max_side", "reencode", "quality", "processes")
        options |= {name: getattr(arguments, name) for name in names} | _reading(arguments)
        made = dict(pack_records(arguments.source, arguments.out, **options))
    if arguments.dry_run:
        return 0
    _index([shard for packed in made.values() for shard in packed.shards])
    for split, packed in made.items():
        print(f"{split:12} {packed.samples:,} samples in {len(packed.shards)} shards  {packed.shards[0] if packed.shards else ''}")
    notes = Counter[str]()
    for packed in made.values():
        notes += getattr(packed, "notes", Counter())
    for line in in_words(notes, arguments.reencode):
        print(line)
    if left_out := sum(getattr(packed, "left_out", 0) for packed in made.values()):
        print(f"{left_out:,} records left out, each with its reason in {arguments.out / LEFT_OUT}")
    return 0


def _reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """How records are read."""
    from vlm_dist.data.fetch import Fetcher
    from vlm_dist.data.layout_boxes import FORMS
    from vlm_dist.data.layouts import Columns

    if arguments.boxes not in (None, *FORMS):
        raise DataError(f"--boxes: found {arguments.boxes!r}; expected one of {', '.join(FORMS)}")
    fetches = arguments.fetch or arguments.fetch_private
    return {
        "columns": Columns(arguments.question, arguments.answer, arguments.image, arguments.boxes, arguments.options_from),
        "fetcher": Fetcher(allow_private=arguments.fetch_private) if fetches else None,
        "tell": print,
        "look_only": arguments.dry_run,
    }


def _index(shards: list[Path]) -> None:
    """Beside the shards, so that training need not look for their samples."""
    from vlm_dist.data.index import index_folders
    from vlm_dist.data.storage import Storage

    index_folders([str(shard) for shard in shards], Storage())


def _refuse(arguments: argparse.Namespace, *names: str) -> None:
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) not in (None, False)]:
        raise DataError(f"{given[0]}: found with --format {arguments.format}; expected --format records, which reads it")


def _check_positive(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) < 1:
            raise DataError(f"--{name.replace('_', '-')}: found {getattr(arguments, name)}; expected 1 or more")
