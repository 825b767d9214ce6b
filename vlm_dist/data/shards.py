"""Tar shards on disk: write them, find them by path, brace pattern or glob, refuse at the door what is no shard, and read them."""

from __future__ import annotations

import glob
import itertools
import os
import random
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlm_dist.errors import DataError

BLOCK = 512  # bytes in a tar header, and the unit that members are padded to

KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as webdataset splits a member's name
LONG_NAME_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)


def write_shards(out: Path, name: str, samples: Iterable[dict], *, samples_per_shard: int, total: int | None = None) -> list[Path]:
    """Write webdataset samples to `out/NAME-000000.tar`, ...: reproducible bytes, each shard renamed into place when whole.

    A progress bar is shown on a terminal; `total` gives its length.
    """
    from rich.progress import track

    out.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    shown = track(samples, description=name, total=total, transient=True, disable=not sys.stdout.isatty())
    stream = iter(shown)
    while batch := list(itertools.islice(stream, samples_per_shard)):
        path = out / f"{name}-{len(shards):06d}.tar"
        _write_shard(path, batch)
        shards.append(path)
    return shards


def find_shards(patterns: Iterable[str], where: str) -> list[str]:
    """The shards that paths, brace patterns (`{000..009}`) and globs name, in order, each a readable tar.

    Args:
        where: the configuration key, for the error message.

    Raises:
        DataError: nothing matches, a URL scheme is not allowed, or a file is no whole tar.
    """
    shards = find_paths(patterns, where)
    for shard in shards:
        check_shard(shard, where)
    return shards


def find_paths(patterns: Iterable[str], where: str) -> list[str]:
    """What patterns name, in order, whatever it holds.

    Raises:
        DataError: nothing matches, or a URL scheme is not allowed.
    """
    from braceexpand import braceexpand

    shards: list[str] = []
    for pattern in patterns:
        if pattern.startswith("pipe:"):
            raise DataError(f"{where}: '{pattern}' would run a command; give paths of tar files")
        if "://" in pattern and not pattern.startswith("file://"):
            raise DataError(f"{where}: '{pattern}' is a remote address; only local paths are read so far: copy the shards here")
        found = [path for part in braceexpand(pattern.removeprefix("file://")) for path in _expand_glob(part)]
        if not found:
            raise DataError(
                f"{where}: no shard matches '{pattern}' (looked in {os.getcwd()}); "
                "check the path, or make shards with `vlm-dist data synth`"
            )
        shards += found
    return shards


def check_shard(path: str, where: str) -> None:
    """Refuse a file that is missing, is not a tar, or was cut short (webdataset would end such a shard without a word)."""
    if not os.path.isfile(path):
        raise DataError(f"{where}: shard '{path}' does not exist; check the pattern")
    size = os.path.getsize(path)
    with Path(path).open("rb") as file:
        first = file.read(BLOCK)
        if size == 0 or not _is_header_or_end(first):
            raise DataError(
                f"{where}: '{path}' is not a tar file ({size:,} bytes); expected an uncompressed tar shard of image-text samples"
            )
        file.seek(max(0, size - BLOCK))
        if file.read(BLOCK) != bytes(BLOCK):
            raise DataError(f"{where}: shard '{path}' is cut short (no end-of-archive mark after {size:,} bytes); copy or make it again")


def count_samples(path: str, where: str) -> int:
    """Number of samples in a shard, from its headers alone: webdataset's rule, consecutive members with one key.

    Raises:
        DataError: a header inside the shard is damaged.
    """
    count, last = 0, None
    size = os.path.getsize(path)
    with Path(path).open("rb") as file:
        position = 0
        while position + BLOCK <= size:
            file.seek(position)
            header = file.read(BLOCK)
            if header == bytes(BLOCK):
                break
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise DataError(f"{where}: shard '{path}' is damaged at byte {position:,} ({error}); copy or make it again") from None
            if member.type in LONG_NAME_TYPES:
                return _count_by_tarfile(path)
            if member.isreg() and (name := KEY_AND_EXTENSION.match(member.name)):
                count, last = count + (name[1] != last), name[1]
            position += BLOCK + -(-member.size // BLOCK) * BLOCK
    return count


def read_in_order(shards: list[str]) -> Iterator[dict[str, Any]]:
    """Raw samples of the shards, one after another: `__key__`, `__url__`, and the members' bytes by extension."""
    from webdataset.pipeline import DataPipeline
    from webdataset.shardlists import SimpleShardList
    from webdataset.tariterators import tarfile_to_samples

    return iter(DataPipeline(SimpleShardList(shards), tarfile_to_samples(handler=_refuse)))


def read_shuffled(shards: list[str], seed: int, epoch: int, window: int) -> Iterator[dict[str, Any]]:
    """Raw samples of one epoch in its order."""
    from webdataset.filters import shuffle

    rng = random.Random(f"{seed}/{epoch}")
    order = rng.sample(shards, len(shards))
    return shuffle(window, initial=window, rng=rng)(read_in_order(order))


def _refuse(error: BaseException) -> bool:
    """webdataset's handler: a shard that fails while it is read ends the run, by name."""
    raise DataError(f"a shard cannot be read: {error}") from None


def _count_by_tarfile(path: str) -> int:
    """The same count for shards with long names, whose headers only tarfile reads in full."""
    with tarfile.open(path) as tar:
        keys = [name[1] for member in tar if member.isreg() and (name := KEY_AND_EXTENSION.match(member.name))]
    return sum(number == 0 or key != keys[number - 1] for number, key in enumerate(keys))


def _is_header_or_end(block: bytes) -> bool:
    if block == bytes(BLOCK):
        return True
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _expand_glob(part: str) -> list[str]:
    return sorted(glob.glob(part)) if glob.has_magic(part) else ([part] if os.path.exists(part) else [])


def _write_shard(path: Path, samples: list[dict]) -> None:
    from webdataset.writer import TarWriter

    partial = path.with_name(f".{path.name}.partial")
    with TarWriter(str(partial), mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    partial.rename(path)
