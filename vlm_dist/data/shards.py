"""Tar shards: write them, find them by path, address, brace pattern or glob, and read them from beginning to end."""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from vlm_dist.data.storage import Storage, is_remote
from vlm_dist.data.tar import BLOCK, check_start, scan
from vlm_dist.disk import cache_folder
from vlm_dist.errors import DataError

logger = logging.getLogger(__name__)


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
        write_shard(path, batch)
        shards.append(path)
    return shards


OTHER_SPLITS = re.compile(r"(^|[-_.])(held-?out|val|valid|validation|dev|test|testing|eval)([-_.]|$)")


def find_paths(patterns: Iterable[str], where: str, storage: Storage | None = None, *, allow_commands: bool = False) -> list[str]:
    """The shards that paths, addresses, brace patterns (`{000..009}`), globs and folders name, in order, whatever they hold. A folder
    stands for its *.tar; where some of these are held out by their names, for those alone that `where` is about.

    Args:
        where: the configuration key, for the error message.
        allow_commands: run the command of `pipe:COMMAND` and take its output for a shard.

    Raises:
        DataError: nothing matches, or a command is not allowed or failed.
    """
    from braceexpand import braceexpand

    storage = storage or Storage()
    shards: list[str] = []
    for pattern in patterns:
        if pattern.startswith("pipe:"):
            if not allow_commands:
                raise DataError(
                    f"{where}: '{pattern}' would run a command; give paths or addresses of tar files, "
                    "or set data.allow_commands: true if you trust every word of it"
                )
            shards += [output_of(command) for command in braceexpand(pattern.removeprefix("pipe:"))]
            continue
        parts = {part: _expand(part, where, storage) for part in braceexpand(pattern.removeprefix("file://"))}
        found = [path for paths in parts.values() for path in paths]
        missing = next((part for part, paths in parts.items() if not paths), None)
        if found and missing is not None:
            raise DataError(f"{where}: '{pattern}' names '{missing}', which is not there; give a pattern of shards that all exist")
        if not found:
            raise DataError(
                f"{where}: no shard matches '{pattern}' (looked in {os.getcwd()}); "
                "check the path, or make shards of your data with `vlm-dist data pack` (`vlm-dist data synth` makes some to try)"
            )
        shards += found
    return shards


def output_of(command: str) -> str:
    """The file in the cache with what a command printed; it runs once.

    Raises:
        DataError: the command failed.
    """
    path = cache_folder() / "commands" / f"{hashlib.sha256(command.encode()).hexdigest()[:32]}.tar"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            ended = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, check=False)
        if ended.returncode:
            partial.unlink()
            said = ended.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise DataError(f"data: the command '{command}' ended with code {ended.returncode}: {said[0][:300]}")
        partial.rename(path)
    return str(path)


def read_in_order(shards: Sequence[str], storage: Storage | None = None) -> Iterator[dict[str, Any]]:
    """Raw samples of the shards, one after another, through webdataset: `__key__`, `__url__`, and the members' bytes by extension.

    Raises:
        DataError: a shard cannot be read to its end, or is damaged.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    reader = storage or Storage()
    for shard in shards:
        size, _ = reader.stamp(shard, "data")
        with reader.open(shard) as stream:
            check_start(stream, shard, size, "data")
            begins = [block * BLOCK for block in scan(stream, size, shard, "data").archives]
            for begin, end in itertools.pairwise([*begins, size]):
                files = tar_file_expander([{"url": shard, "stream": _Part(stream, begin, end)}], handler=_refuse)
                yield from group_by_keys(files, handler=_refuse)


class _Part:
    """A piece of a file, to be read once from its beginning: webdataset stops where the first archive of a file ends."""

    def __init__(self, file: IO[bytes], begin: int, end: int):
        self.file, self.left = file, end - begin
        file.seek(begin)

    def read(self, length: int) -> bytes:
        data = self.file.read(min(length, self.left))
        self.left -= len(data)
        return data


def _refuse(error: BaseException) -> bool:
    """webdataset's handler: a shard that fails while it is read ends the run, by name."""
    words = str(error.args[0] if error.args else type(error).__name__).partition(" @ <")[0]
    raise DataError(f"a shard cannot be read: {words}") from None


def _expand(part: str, where: str, storage: Storage) -> list[str]:
    if part.endswith("/") if is_remote(part) else os.path.isdir(part):
        return _of_folder(part, where, storage)
    if is_remote(part):
        return storage.find(part)
    return sorted(glob.glob(part)) if glob.has_magic(part) else ([part] if os.path.exists(part) else [])


def _of_folder(folder: str, where: str, storage: Storage) -> list[str]:
    pattern = f"{folder.rstrip('/')}/*.tar"
    found = storage.find(pattern) if is_remote(folder) else sorted(glob.glob(pattern))
    if not found:
        raise DataError(
            f"{where}: the folder '{folder}' holds no shard (*.tar); make shards of what is in it with `vlm-dist data pack {folder} OUT`, "
            "and give OUT"
        )
    apart = [path for path in found if OTHER_SPLITS.search(path.rsplit("/", 1)[-1].lower())]
    if not apart or len(apart) == len(found) or not where.startswith(("data.", "data verify")):
        return found
    chosen = apart if "heldout" in where else [path for path in found if path not in apart]
    left = [path.rsplit("/", 1)[-1] for path in found if path not in chosen]
    logger.warning("%s: of the folder '%s' %d shards are taken; left out by their names: %s%s", where, folder, len(chosen), left[0],
                   f" and {len(left) - 1} more" if left[1:] else "")  # fmt: skip
    return chosen


def write_shard(path: Path, samples: list[dict]) -> None:
    """One shard of webdataset samples, in place when it is whole."""
    from webdataset.writer import TarWriter

    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
            for sample in samples:
                writer.write(sample)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
