"""Where each sample lies in its shard, read once from the tar headers: so that any sample is found and read without the others.

The index of a folder is one file beside its shards (`vlm-dist data index` writes it): safetensors with, for S shards and N samples,
`sizes` [S] bytes, `counts` [S] samples, `ends` [S] and `starts` [N] in blocks of 512 bytes, and the shards' names as metadata, with a
sha256 of all that (older ones have none). Shards without one are indexed when training starts, and what took long to read is kept in the
user's cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vlm_dist.data.index_file import INDEX_NAME, VERSION, Index, read_index, write_index
from vlm_dist.data.storage import Storage, is_remote
from vlm_dist.data.tar import BLOCK, check_end, check_start, scan
from vlm_dist.disk import cache_folder, remedy, why
from vlm_dist.errors import DataError

RECORD = 10_240  # bytes that tar pads an archive to
logger = logging.getLogger(__name__)
WORTH_KEEPING = 256 * 2**20  # bytes of shards from which on an index made in passing is kept in the cache


class _Scanned(NamedTuple):
    size: int
    starts: list[int]
    end: int


def open_index(shards: Sequence[str], where: str, storage: Storage) -> Index:
    """The index of these shards: from the files beside them, from the cache, or read now.

    Args:
        shards: paths or addresses, as `find_paths` gives them.
        where: the configuration key, for error messages.

    Raises:
        DataError: a shard is missing, damaged, or not the one that was indexed.
    """
    by_folder: dict[str, list[str]] = {}
    for shard in shards:
        by_folder.setdefault(_folder(shard), []).append(shard)
    known: dict[str, _Scanned | tuple[Index, int]] = {}
    for folder, members in by_folder.items():
        known |= _from_file(folder, members, where, storage)
    missing = [shard for shard in dict.fromkeys(shards) if shard not in known]
    if missing:
        found = _from_cache(missing, where, storage)
        known |= {shard: (found, number) for number, shard in enumerate(missing)}
    return _select(shards, known)


def scan_shards(shards: Sequence[str], where: str, storage: Storage) -> Index:
    """Read the headers of these shards, several at a time, with a progress bar on a terminal."""
    import numpy as np
    from rich.progress import track

    scan_one = partial(_scan_shard, where=where, storage=storage)
    with ThreadPoolExecutor(16 if is_remote(shards[0]) else 2, "index") as pool:
        bar = track(pool.map(scan_one, shards), "indexing", len(shards), transient=True, disable=not sys.stderr.isatty() or len(shards) < 2)
        found = list(bar)
    return Index(
        list(shards),
        np.array([shard.size for shard in found], np.int64),
        np.array([len(shard.starts) for shard in found], np.int64),
        np.array([shard.end for shard in found], np.uint32),
        np.concatenate([np.array(shard.starts, np.uint32) for shard in found]),
    )


class Written(NamedTuple):
    """What `index_folders` did in one folder."""

    path: str
    shards: int
    samples: int
    bytes: int


def index_folders(shards: Sequence[str], storage: Storage, out: Path | None = None) -> list[Written]:
    """Write an index beside the shards of each folder, on a server too; or one into the folder `out`.

    Raises:
        DataError: a shard is damaged, or the index cannot be written there.
    """
    by_folder: dict[str, list[str]] = {}
    for shard in dict.fromkeys(shards):
        by_folder.setdefault(_folder(shard), []).append(shard)
    if out is not None and len(by_folder) > 1:
        raise DataError(f"--out: the shards lie in {len(by_folder)} folders, and each needs an index of its own; name those of one")
    written = []
    for folder, members in by_folder.items():
        index = scan_shards(members, "data index", storage)
        path = f"{out}/{INDEX_NAME}" if out else folder + INDEX_NAME
        if is_remote(path):
            with tempfile.TemporaryDirectory() as temporary:
                write_index(index, Path(temporary) / INDEX_NAME)
                storage.upload(Path(temporary) / INDEX_NAME, path)
        else:
            try:
                write_index(index, Path(path))
            except OSError as error:
                raise DataError(f"{path}: cannot be written, {why(error)}; {remedy(error)}, or give a folder with --out") from None
        written.append(Written(path, len(members), len(index), int(index.sizes.sum())))
    return written


def _select(shards: Sequence[str], known: dict[str, Any]) -> Index:
    """The rows of these shards, in their order, out of one or several indexes."""
    import numpy as np

    rows = [known[shard] for shard in shards]
    whole = rows[0][0]
    if len(rows) == len(whole.shards) and all(index is whole and number == place for place, (index, number) in enumerate(rows)):
        return whole

    def column(name: str) -> np.ndarray:
        return np.array([getattr(index, name)[number] for index, number in rows])

    starts = [index.starts[index.first[number] : index.first[number + 1]] for index, number in rows]
    return Index(list(shards), column("sizes"), column("counts"), column("ends"), np.concatenate(starts))


def _from_file(folder: str, shards: list[str], where: str, storage: Storage) -> dict[str, tuple[Index, int]]:
    """Rows of the index beside the shards, of those that it knows."""
    path = storage.local_copy(folder + INDEX_NAME)
    if path is None:
        return {}
    index = read_index(path, folder)
    places = {shard: number for number, shard in enumerate(index.shards)}
    known = {shard: (index, places[shard]) for shard in shards if shard in places}
    sizes = {shard: int(index.sizes[number]) for shard, (_, number) in known.items() if not is_remote(shard)}
    changed = [shard for shard, size in sizes.items() if storage.stamp(shard, where)[0] != size]
    if changed:
        logger.warning("%s: %s and %d more were written after %s; reading their headers", where, changed[0], len(changed) - 1, path)
    longer = [shard for shard, (_, number) in known.items() if not index.is_checked and _goes_on(index, number)]
    if longer:
        logger.warning("%s: %s and %d more go on behind what %s knows; reading their headers", where, longer[0], len(longer) - 1, path)
    return {shard: place for shard, place in known.items() if shard not in changed and shard not in longer}


def _goes_on(index: Index, number: int) -> bool:
    """Whether more than padding lies behind a shard's last sample: indexes without a checksum know the first of several archives only."""
    padded = -(-(int(index.ends[number]) * BLOCK + 2 * BLOCK) // RECORD) * RECORD
    return int(index.sizes[number]) > padded


def _from_cache(shards: list[str], where: str, storage: Storage) -> Index:
    """Scan shards that no file knows; of many bytes only once on this machine, however many ranks ask."""
    stamps = [storage.stamp(shard, where) for shard in shards]
    if sum(size for size, _ in stamps) < WORTH_KEEPING:
        return scan_shards(shards, where, storage)
    digest = hashlib.sha256(json.dumps([VERSION, shards, stamps]).encode()).hexdigest()[:32]
    path = cache_folder() / "index" / f"{digest}.safetensors"
    with _one_at_a_time(path):
        try:
            if path.exists() and (kept := read_index(path)).is_checked:
                return replace(kept, shards=shards)
        except DataError as error:
            logger.warning("%s; made anew", str(error).rpartition(";")[0])
        index = scan_shards(shards, where, storage)
        try:
            write_index(index, path)
        except OSError as error:
            logger.warning("%s cannot be written (%s); going on without it", path, error.strerror)
        return index


@contextmanager
def _one_at_a_time(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _scan_shard(shard: str, *, where: str, storage: Storage) -> _Scanned:
    size, _ = storage.stamp(shard, where)
    with storage.open(shard) as file:
        check_start(file, shard, size, where)
        check_end(file, shard, size, where)
        found = scan(file, size, shard, where)
        return _Scanned(size, found.starts, found.end)


def _folder(shard: str) -> str:
    """With the slash at its end."""
    return shard[: shard.rfind("/") + 1]
