"""What shards hold, in a few digests: whether they are those of an earlier start, though names and sizes are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from vlm_dist.data.dataset import Dataset

WHOLE = 256 * 2**20  # bytes of a data set here that are all read
PIECES, PIECE = 4096, 16 * 2**10  # of a larger one: so many pieces of so many bytes, evenly spread
REMOTE_PIECES, REMOTE_PIECE = 256, 4096
GROUPS = 64  # digests at most


def content_digests(dataset: Dataset) -> dict[str, str]:
    """sha256 of what neighbouring shards hold, by the name of the shard, or of the first and last of some. A data set of this machine of
    up to 256 MiB is read whole; of a larger one 64 MiB are, and of one on servers 1 MiB: what was written anew shows, what was changed in
    few places may not.

    Raises:
        DataError: a shard cannot be read.
    """
    index, sizes = dataset.index, dataset.index.sizes.tolist()
    length = REMOTE_PIECE if dataset.is_remote else PIECE
    if sum(sizes) <= WHOLE and not dataset.is_remote:
        places = [list(range(0, size, PIECE)) for size in sizes]
    else:
        places = _spread(sizes, REMOTE_PIECES if dataset.is_remote else PIECES)

    def digest(number: int) -> bytes:
        found = hashlib.sha256(index.starts[index.first[number] : index.first[number + 1]].tobytes())
        shard, size = index.shards[number], sizes[number]
        for start in places[number]:
            found.update(dataset.storage.read(shard, start, min(length, size - start)))
        return found.digest()

    with ThreadPoolExecutor(16 if dataset.is_remote else 2, "content") as pool:
        digests = list(pool.map(digest, range(len(index.shards))))
    return dict(_grouped(index.names, digests))


def _spread(sizes: list[int], pieces: int) -> list[list[int]]:
    """Of each shard, where so many pieces of all shards begin, evenly over their bytes."""
    places: list[list[int]] = [[] for _ in sizes]
    shard, before, total = 0, 0, sum(sizes)
    for piece in range(pieces):
        at = piece * total // pieces
        while at - before >= sizes[shard]:
            before += sizes[shard]
            shard += 1
        places[shard].append(at - before)
    return places


def _grouped(names: list[str], digests: list[bytes]) -> Iterator[tuple[str, str]]:
    size = -(-len(names) // GROUPS)
    for start in range(0, len(names), size):
        group = names[start : start + size]
        whole = hashlib.sha256(b"".join(digests[start : start + size])).hexdigest()[:32]
        yield (group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}"), whole
