"""Where each sample lies in its shard, read once from the tar headers: so that any sample is found and read without the others.

The index of a folder is one file beside its shards (`vlm-dist data index` writes it): safetensors with, for S shards and N samples,
`sizes` [S] bytes, `counts` [S] samples, `ends` [S] and `starts` [N] in blocks of 512 bytes, and the shards' names as metadata. Shards
without one are indexed when training starts, and what took long to read is kept in the user's cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_dist.data.cache import cache_folder
from vlm_dist.data.storage import Storage, is_remote
from vlm_dist.data.tar import BLOCK, check_ends, scan
from vlm_dist.errors import DataError

if TYPE_CHECKING:
    import numpy as np

INDEX_NAME = "vlm_dist.index.safetensors"
VERSION = 1
logger = logging.getLogger(__name__)
WORTH_KEEPING = 256 * 2**20  # bytes of shards from which on an index made in passing is kept in the cache


class Place(NamedTuple):
    """Where a sample's members stand."""

    shard: str
    start: int
    """Bytes from the shard's beginning."""
    length: int
    """Bytes, headers and padding included."""


@dataclass(frozen=True)
class Index:
    """The samples of some shards, numbered through in the order of the shards."""

    shards: list[str]
    sizes: np.ndarray
    """[S] int64: bytes."""
    counts: np.ndarray
    """[S] int64: samples."""
    ends: np.ndarray
    """[S] uint32: where a shard's last sample ends, in blocks of 512 bytes."""
    starts: np.ndarray
    """[N] uint32: where each sample begins, in blocks of 512 bytes."""

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def first(self) -> np.ndarray:
        """[S + 1] int64: the number of each shard's first sample, and N."""
        import numpy as np

        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])

    @cached_property
    def digest(self) -> str:
        """sha256 of the shards' names, sizes and counts: whether two starts of a run see the same data."""
        names = [shard.rsplit("/", 1)[-1] for shard in self.shards]
        return hashlib.sha256(json.dumps([names, self.sizes.tolist(), self.counts.tolist()]).encode()).hexdigest()

    def place(self, number: int) -> Place:
        """Where sample `number` is: binary search over the shards, nothing else."""
        import numpy as np

        shard = int(np.searchsorted(self.first, number, side="right")) - 1
        is_last = number + 1 == self.first[shard + 1]
        start = int(self.starts[number])
        end = int(self.ends[shard] if is_last else self.starts[number + 1])
        return Place(self.shards[shard], start * BLOCK, (end - start) * BLOCK)


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
                raise DataError(f"{path}: cannot be written ({error.strerror}); give a folder with --out") from None
        written.append(Written(path, len(members), len(index), int(index.sizes.sum())))
    return written


def write_index(index: Index, path: Path) -> None:
    """Put the index in place, whole or not at all."""
    from safetensors.numpy import save_file

    about = json.dumps({"version": VERSION, "names": [shard.rsplit("/", 1)[-1] for shard in index.shards]})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f".{path.name}.{os.getpid()}.partial")
    arrays = {"sizes": index.sizes, "counts": index.counts, "ends": index.ends, "starts": index.starts}
    save_file(arrays, partial_file, {"index": about})  # one entry: of several the order would vary
    partial_file.replace(path)


def read_index(path: Path, folder: str = "") -> Index:
    """An index file; `folder` is put before the shards' names.

    Raises:
        DataError: it is none, or of another version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get("index", "{}"))
            if about.get("version") != VERSION:
                raise DataError(
                    f"{path}: index of version {about.get('version')}, expected {VERSION}; make it again: `vlm-dist data index`"
                )
            arrays = {name: file.get_tensor(name) for name in ("sizes", "counts", "ends", "starts")}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read as an index ({error}); make it again with `vlm-dist data index`") from None
    return Index([folder + name for name in about["names"]], **arrays)


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
    return {shard: place for shard, place in known.items() if shard not in changed}


def _from_cache(shards: list[str], where: str, storage: Storage) -> Index:
    """Scan shards that no file knows; of many bytes only once on this machine, however many ranks ask."""
    stamps = [storage.stamp(shard, where) for shard in shards]
    if sum(size for size, _ in stamps) < WORTH_KEEPING:
        return scan_shards(shards, where, storage)
    digest = hashlib.sha256(json.dumps([VERSION, shards, stamps]).encode()).hexdigest()[:32]
    path = cache_folder() / "index" / f"{digest}.safetensors"
    with _one_at_a_time(path):
        if path.exists():
            return replace(read_index(path), shards=shards)
        index = scan_shards(shards, where, storage)
        write_index(index, path)
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
        check_ends(file, shard, size, where)
        return _Scanned(size, *scan(file, size, shard, where))


def _folder(shard: str) -> str:
    """With the slash at its end."""
    return shard[: shard.rfind("/") + 1]
