"""A data set: shards with their index, read sample by sample."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.config import DataConfig
from vlm_dist.data.cache import RangeCache
from vlm_dist.data.index import open_index
from vlm_dist.data.index_file import Index, Place
from vlm_dist.data.lanes import Order
from vlm_dist.data.shards import find_paths
from vlm_dist.data.storage import Storage, is_remote
from vlm_dist.data.tar import Damaged, member_key, members
from vlm_dist.disk import cache_folder
from vlm_dist.errors import BadSample, DataError

logger = logging.getLogger(__name__)


@dataclass
class Dataset:
    """One source of samples."""

    name: str
    index: Index
    storage: Storage
    weight: float = 1.0
    """Of a mixture: its share of the draws, relative to the others'."""

    @property
    def is_remote(self) -> bool:
        return any(map(is_remote, self.index.shards))

    def raw(self, number: int, order: Order | None = None) -> dict[str, Any]:
        """A sample as webdataset gives it: `__key__`, `__url__`, and the members' bytes by extension.

        Args:
            order: in which samples are read, if in any: of a remote shard the whole block is fetched.

        Raises:
            BadSample: two members of one name.
            DataError: the bytes are not those that were indexed, or cannot be read.
        """
        place = self.index.place(number)
        data = self.storage.read(place.shard, place.start, place.length, self._block(number, order) if order else None)
        return parse_members(data, place)

    def prefetch(self, number: int, order: Order) -> None:
        """Begin to fetch the block of a sample, if its shard is remote."""
        start, length = self._block(number, order)
        self.storage.prefetch(self.index.place(number).shard, start, length)

    def _block(self, number: int, order: Order) -> tuple[int, int]:
        """(start, length) in bytes of the block that a sample belongs to."""
        import numpy as np

        shard = int(np.searchsorted(self.index.first, number, side="right")) - 1
        begin, end = order.block_of(number, int(self.index.first[shard]))
        start = self.index.place(begin).start
        last = self.index.place(min(end, int(self.index.first[shard + 1])) - 1)
        return start, last.start + last.length - start


def open_datasets(config: DataConfig) -> list[Dataset]:
    """The data sets of `data.train`.

    Raises:
        DataError: no shard, a damaged shard, or no sample in any.
    """
    storage = open_storage(config)
    mixed = isinstance(config.train, dict)
    datasets = []
    for name, source in config.sources.items():
        where = f"data.train.{name}" if mixed else "data.train"
        datasets.append(open_dataset(source.shards, where, storage, config.allow_commands, name, source.weight))
    return datasets


def open_dataset(
    patterns: Sequence[str], where: str, storage: Storage, allow_commands: bool = False, name: str = "data", weight: float = 1.0
) -> Dataset:
    """Find the shards that patterns name, and their index.

    Args:
        where: the configuration key, for error messages.

    Raises:
        DataError: no shard, a damaged shard, or no sample in any.
    """
    shards = find_paths(patterns, where, storage, allow_commands=allow_commands)
    index = open_index(shards, where, storage)
    if not len(index):
        raise DataError(f"{where}: the {len(shards)} shards hold no sample; make them again, e.g. with `vlm-dist data synth`")
    if empty := [shard for shard, count in zip(index.shards, index.counts, strict=True) if not count]:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        logger.warning("%s: shard '%s'%s of %d holds no sample; make it again, or leave it out", where, empty[0], more, len(shards))
    return Dataset(name, index, storage, weight)


def open_heldout(config: DataConfig) -> Dataset | None:
    """The data set of `data.heldout`, if any is named.

    Raises:
        DataError: as `open_dataset` does.
    """
    if not config.heldout:
        return None
    return open_dataset(config.heldout, "data.heldout", open_storage(config), config.allow_commands)


def open_storage(config: DataConfig) -> Storage:
    """With a cache for remote shards, if there are any."""
    if not any(map(is_remote, [*config.train_shards, *config.heldout])):
        return Storage()
    if config.cache_whole:
        return Storage(whole=True)
    folder = Path(config.cache_dir) if config.cache_dir else cache_folder() / "ranges"
    return Storage(RangeCache(folder, int(config.cache_gb * 10**9)))


def parse_members(data: bytes, place: Place) -> dict[str, Any]:
    """The tar members of one sample, held in memory, grouped as webdataset does; nothing is extracted.

    Raises:
        BadSample: two members of one name.
        DataError: there is no sample at this place.
    """
    from webdataset.tariterators import group_by_keys

    try:
        files = [{"fname": name, "data": content, "__url__": place.shard} for name, content in _members(data)]
        _refuse_twins([file["fname"] for file in files], place.shard)
        samples = list(group_by_keys(files))
    except Damaged as damage:
        samples, problem = [], str(damage)
    else:
        problem = f"{len(samples)} samples"
    if len(samples) != 1:
        raise DataError(
            f"data: shard '{place.shard}' does not hold at byte {place.start:,} what its index says ({problem}); "
            "it was changed: make its index again with `vlm-dist data index`"
        )
    return samples[0]


def _refuse_twins(names: list[str], shard: str) -> None:
    """Two members of one sample with one name; the case of the ending does not matter."""
    seen: dict[str, str] = {}
    for name in names:
        key, _, ending = name.rpartition("/")[2].partition(".")
        first = seen.setdefault(name[: len(name) - len(ending)] + ending.lower(), name)
        if first is not name:
            twin = f"'{name}'" if first == name else f"'{first}' and '{name}', which are one,"
            raise BadSample(f"sample '{key}' of shard '{shard}' has {twin} twice; write the shard anew with one of them")


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files in a piece of a tar."""
    view = memoryview(data)
    for member in members(lambda position, length: data[position : position + length], len(data), is_piece=True):
        if member_key(member) is not None:
            yield member.name, bytes(view[member.data : member.data + member.size])
