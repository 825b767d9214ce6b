"""Tar headers: where the samples of a shard begin and end. Member contents are not read."""

from __future__ import annotations

import re
import tarfile
from typing import IO

from vlm_dist.errors import DataError

BLOCK = 512  # bytes in a tar header, and the unit that members are padded to
KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as webdataset splits a member's name
LONG_NAME_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def check_ends(file: IO[bytes], path: str, size: int, where: str) -> None:
    """Refuse what is not a tar, or was cut short (webdataset would end such a shard without a word)."""
    file.seek(0)
    first = file.read(BLOCK)
    if size == 0 or not _is_header_or_end(first):
        raise DataError(f"{where}: '{path}' is not a tar file ({size:,} bytes); expected an uncompressed tar shard of image-text samples")
    file.seek(max(0, size - BLOCK))
    if file.read(BLOCK) != bytes(BLOCK):
        raise DataError(f"{where}: shard '{path}' is cut short (no end-of-archive mark after {size:,} bytes); copy or make it again")


def scan(file: IO[bytes], size: int, path: str, where: str) -> tuple[list[int], int]:
    """Where each sample begins and where the last ends, in blocks; webdataset's rule: consecutive members with one key.

    Raises:
        DataError: it is damaged, or the members of a sample stand apart.
    """
    found = _Found(path, where)
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
            return _scan_by_tarfile(file, path, where)
        after = position + BLOCK + -(-member.size // BLOCK) * BLOCK
        found.add(member, position, after)
        position = after
    return found.starts, found.end


def member_key(member: tarfile.TarInfo) -> str | None:
    """The sample that a member belongs to; None: to none (folders, links, names without an extension, `__meta__`)."""
    if not member.isreg() or member.name.startswith("__"):
        return None
    name = KEY_AND_EXTENSION.match(member.name)
    return name[1] if name else None


class _Found:
    """Samples of a shard, member by member."""

    def __init__(self, path: str, where: str):
        self.path, self.where = path, where
        self.starts: list[int] = []
        self.end = 0
        self._last: str | None = None
        self._seen: dict[str, str] = {}

    def add(self, member: tarfile.TarInfo, start: int, after: int) -> None:
        """A member that stands at these bytes."""
        key = member_key(member)
        if key is None:
            return
        if key != self._last:
            self._new_sample(key, member.name[len(key) + 1 :])
            self.starts.append(start // BLOCK)
        self._last, self.end = key, after // BLOCK

    def _new_sample(self, key: str, extension: str) -> None:
        """A key that comes again with the same first member is the same sample twice; with another it is its other half."""
        first = self._seen.setdefault(key, extension)
        if first != extension:
            raise DataError(
                f"{self.where}: the members of '{key}' stand apart in shard '{self.path}' (.{first} and later .{extension}); they must "
                f"follow one another: write it sorted by name: `tar --sort=name -cf`"
            )


def _scan_by_tarfile(file: IO[bytes], path: str, where: str) -> tuple[list[int], int]:
    """The same for shards with long names, whose headers only tarfile reads in full."""
    found = _Found(path, where)
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        for member in tar:
            found.add(member, member.offset, member.offset_data + -(-member.size // BLOCK) * BLOCK)
    return found.starts, found.end


def _is_header_or_end(block: bytes) -> bool:
    if block == bytes(BLOCK):
        return True
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
