"""The file of an index: the samples of some shards, where each lies, and a checksum of that."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_dist.data.tar import BLOCK
from vlm_dist.errors import DataError
from vlm_dist.redaction import redacted

if TYPE_CHECKING:
    import numpy as np

INDEX_NAME = "vlm_dist.index.safetensors"
VERSION = 1
COLUMNS = {"sizes": "int64", "counts": "int64", "ends": "uint32", "starts": "uint32"}


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
    is_checked: bool = True
    """Made now, or read from a file with a checksum."""

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def first(self) -> np.ndarray:
        """[S + 1] int64: the number of each shard's first sample, and N."""
        import numpy as np

        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])

    @cached_property
    def names(self) -> list[str]:
        """The shards' file names; of an address without what signs it, which the next start may have anew."""
        return [(redacted(shard) if "://" in shard else shard).rsplit("/", 1)[-1] for shard in self.shards]

    @cached_property
    def digest(self) -> str:
        """sha256 of the shards' names, sizes and counts: whether two starts of a run see the same data."""
        return hashlib.sha256(json.dumps([self.names, self.sizes.tolist(), self.counts.tolist()]).encode()).hexdigest()

    def place(self, number: int) -> Place:
        """Where sample `number` is: binary search over the shards, nothing else."""
        import numpy as np

        shard = int(np.searchsorted(self.first, number, side="right")) - 1
        is_last = number + 1 == self.first[shard + 1]
        start = int(self.starts[number])
        end = int(self.ends[shard] if is_last else self.starts[number + 1])
        return Place(self.shards[shard], start * BLOCK, (end - start) * BLOCK)


def write_index(index: Index, path: Path) -> None:
    """Put the index in place, whole or not at all.

    Raises:
        OSError: there is no room, or nothing can be written there.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save

    arrays = {name: getattr(index, name) for name in COLUMNS}
    names = [shard.rsplit("/", 1)[-1] for shard in index.shards]
    about = json.dumps({"version": VERSION, "names": names, "sha256": _checksum(names, arrays)})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial_file.write_bytes(save(arrays, {"index": about}))  # one entry: of several the order would vary
        partial_file.replace(path)
    except (OSError, SafetensorError):
        partial_file.unlink(missing_ok=True)
        raise


def read_index(path: Path, folder: str = "") -> Index:
    """An index file; `folder` is put before the shards' names.

    Raises:
        DataError: it is none, of another version, or damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get("index", "{}"))
            if about.get("version") != VERSION:
                raise DataError(
                    f"{path}: index of version {about.get('version')}, expected {VERSION}; make it again: `vlm-dist data index`"
                )
            arrays = {name: file.get_tensor(name) for name in COLUMNS}
        _check_sound(about, arrays)
    except DataError:
        raise
    except Exception as error:  # damaged bytes make safetensors, numpy and json raise whatever they like: MemoryError, KeyError, ...
        words = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise DataError(f"{path}: cannot be read as an index ({words}); make it again with `vlm-dist data index`") from None
    return Index([folder + name for name in about["names"]], **arrays, is_checked="sha256" in about)


def _check_sound(about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Raises:
    ValueError: the checksum is another, or the numbers cannot be an index's.
    """
    names = about["names"]
    if "sha256" in about and about["sha256"] != _checksum(names, arrays):
        raise ValueError("damaged: its checksum is another")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("damaged: it names no shards")
    if any(arrays[name].dtype != kind or arrays[name].ndim != 1 for name, kind in COLUMNS.items()):
        raise ValueError("damaged: its numbers are of another kind")
    sizes, counts, ends, starts = (arrays[name].astype("int64") for name in COLUMNS)
    if not len(names) == len(sizes) == len(counts) == len(ends) or (counts < 0).any() or counts.sum() != len(starts):
        raise ValueError("damaged: its shards and samples do not agree")
    place = 0
    for size, count, end in zip(sizes.tolist(), counts.tolist(), ends.tolist(), strict=True):
        own = starts[place : place + count]
        if end * BLOCK > size or (own[1:] <= own[:-1]).any() or (count and own[-1] >= end):
            raise ValueError("damaged: its samples lie where none can be")
        place += count


def _checksum(names: list[str], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(names).encode())
    for name in COLUMNS:
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
