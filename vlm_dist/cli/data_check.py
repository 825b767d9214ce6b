"""`vlm-dist data index`, `vlm-dist data verify` and `vlm-dist data order`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.cli.parsers import new_parser
from vlm_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlm_dist.data.verify import Findings, Twin

MOSTLY = 0.5  # share of one answer from which on it is told
SHOWN = 20  # rows of a table; --json has all


def add_verify(kinds: Any) -> None:
    parser = new_parser(
        kinds,
        "verify",
        "Read every sample: what is unusable and where, duplicates, and held-out pictures that are trained on.",
        "vlm-dist data verify 'data/synthetic/qa-train-*.tar' --heldout 'data/synthetic/qa-heldout-*.tar'",
    )
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SHARDS",
        help="paths, globs or brace patterns; or one YAML configuration, whose processor then encodes each sample (and overrides such as "
        "data.max_seq_length=512)",
    )
    parser.add_argument("--heldout", nargs="+", default=[], metavar="SHARDS", help="shards that should hold no picture of the others")
    parser.add_argument("--processes", type=int, metavar="N", help="read N shards at a time (default: one per CPU)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_verify)


def add_index(kinds: Any) -> None:
    parser = new_parser(
        kinds,
        "index",
        "Write the index of shards that others made: training then starts at once, and reads samples of remote shards by their places.",
        "vlm-dist data index 'data/synthetic/*.tar'",
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, addresses, globs or brace patterns; all shards of a folder")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write there, to be put beside the shards by hand (one folder only)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_index)


def add_order(kinds: Any) -> None:
    parser = new_parser(
        kinds,
        "order",
        "Print which samples each optimizer step holds, on each rank.",
        "vlm-dist data order configs/quickstart.yaml --world-size 2 --steps 3 training.micro_batch=16",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML configuration; its processor is loaded, its model is not")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides such as seed=1")
    parser.add_argument("--world-size", type=int, default=1, metavar="W", help="ranks (default 1)")
    parser.add_argument("--workers", type=int, metavar="N", help="decoding threads a rank, as data.workers")
    parser.add_argument("--start", type=int, default=0, metavar="STEP", help="the first step to print (default 0)")
    parser.add_argument("--steps", type=int, default=5, metavar="K", help="how many steps (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_order)


def run_verify(arguments: argparse.Namespace) -> int:
    if arguments.processes is not None and arguments.processes < 1:
        raise DataError(f"--processes: found {arguments.processes}; expected 1 or more")
    if arguments.source[0].endswith((".yaml", ".yml")):
        found = _verify_config(arguments)
    else:
        from vlm_dist.config import DataConfig
        from vlm_dist.data.shards import find_paths
        from vlm_dist.data.verify import verify

        heldout = find_paths(arguments.heldout, "data verify --heldout")
        found = verify(
            find_paths(arguments.source, "data verify"), heldout, DataConfig(train=arguments.source), processes=arguments.processes
        )
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        _show(found)
    return 0 if found.sound else DataError.exit_code


def _verify_config(arguments: argparse.Namespace) -> Findings:
    from vlm_dist.checking.verification import verify_config
    from vlm_dist.config_load import load_config

    overrides = [one for one in arguments.source[1:] if "=" in one]
    if strange := [one for one in arguments.source[1:] if "=" not in one]:
        raise ConfigError(f"data verify: found '{strange[0]}' after a configuration; give one configuration, or shards")
    return verify_config(load_config(arguments.source[0], overrides), arguments.heldout, arguments.processes)


def run_index(arguments: argparse.Namespace) -> int:
    from vlm_dist.data.index import index_folders
    from vlm_dist.data.shards import find_paths
    from vlm_dist.data.storage import Storage

    storage = Storage()
    written = index_folders(find_paths(arguments.shards, "data index", storage), storage, out=arguments.out)
    if arguments.json:
        print(json.dumps([row._asdict() for row in written], indent=1))
    else:
        for row in written:
            print(f"{row.path}: {row.samples:,} samples in {row.shards:,} shards of {row.bytes / 1e9:.3f} GB")
    return 0


def run_order(arguments: argparse.Namespace) -> int:
    from vlm_dist.checking.order import order_of
    from vlm_dist.config_load import load_config

    for name, least in {"world_size": 1, "steps": 1, "start": 0}.items():
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')}: found {getattr(arguments, name)}; expected {least} or more")
    more = [] if arguments.workers is None else [f"data.workers={arguments.workers}"]
    config = load_config(arguments.config, [*arguments.overrides, *more])
    steps = order_of(config, world_size=arguments.world_size, steps=arguments.steps, start=arguments.start)
    if arguments.json:
        print(json.dumps({"steps": [{"step": arguments.start + number, "ranks": ranks} for number, ranks in enumerate(steps)]}))
        return 0
    for number, ranks in enumerate(steps):
        for rank, keys in enumerate(ranks):
            print(f"step {arguments.start + number:>6}  rank {rank:>3}  {' '.join(keys)}")
    return 0


def _show(found: Findings) -> None:
    from vlm_dist.data.tally import in_words
    from vlm_dist.data.verify import most_common_reasons

    print(f"{found.samples:,} samples in {found.shards} shards, {found.usable:,} usable")
    if found.problems:
        _table("unusable", ("shard", "sample", "reason"), [(row.shard, row.key or "(the shard)", row.reason) for row in found.problems])
        if len(found.problems) > SHOWN:
            _table("reasons", ("how often", "reason"), [(f"{number:,}", reason) for reason, number in most_common_reasons(found.problems)])
    if found.duplicates:
        _table("the same sample again", ("sample", "the same as"), [_names(twin) for twin in found.duplicates])
    if found.repeated_pictures:
        print(f"{found.repeated_pictures:,} samples ask something else about pictures of earlier ones")
    if found.in_training:
        rows = [(*_names(twin), "yes" if twin.same_text else "no") for twin in found.in_training]
        _table("held out, but trained on", ("held-out sample", "picture stands in", "same text"), rows)
    for line in [*in_words(found.notes), *_about_answers(found)]:
        print(line)
    print("sound" if found.sound else "not sound: see above (--json lists everything)")


def _about_answers(found: Findings) -> list[str]:
    """What a model could learn without looking, in words."""
    if not found.answers:
        return []
    lines, common = [], found.answers["most_common"]
    if (found.answers["different"] > 1 and common["share"] > MOSTLY) or found.answers["different"] == 1 < found.usable:
        lines.append(f"one answer for most: {common['share']:.0%} of the training samples are answered {common['text'][:80]!r}")
    for pattern, samples, forms in found.answers["near_identical"]:
        lines.append(f"near-identical answers: {samples:,} samples in {forms} forms of {pattern[:80]!r}")
    return lines


def _names(twin: Twin) -> tuple[str, str]:
    return f"{twin.key} ({twin.shard})", f"{twin.earlier_key} ({twin.earlier_shard})"


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=f"{title}: {len(rows):,}", title_justify="left", caption_justify="left")
    for row in rows[:SHOWN]:
        table.add_row(*(escape(cell) for cell in row))
    if len(rows) > SHOWN:
        table.caption = f"and {len(rows) - SHOWN:,} more"
    Console().print(table)
