"""Tar headers: where the samples of a shard begin and end. Member contents are not read.

One walk, `members`, serves the index and the reading of a single sample, so that both always see the same. Nothing that a header says is
believed before the file bears it out; archives that were put behind one another with `cat` are read on into.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import IO, NamedTuple

from vlm_dist.data.file_kinds import why_no_shard
from vlm_dist.errors import DataError

BLOCK = 512  # bytes in a tar header, and the unit that members are padded to
ZEROS = bytes(BLOCK)
KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as webdataset splits a member's name
PAX_RECORD = re.compile(rb"([0-9]{1,18}) ([^=]+)=")
LOCAL_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENSIONS = (*LOCAL_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
MOST_EXTENSION = 2**20  # bytes of a long name, or of a pax header
STEP = 2**20  # bytes looked at at a time behind an end-of-archive mark
Read = Callable[[int, int], bytes]
"""read(position, length) -> bytes; fewer at the file's end."""


class Member(NamedTuple):
    """A member of a tar."""

    name: str
    is_file: bool
    start: int
    """Byte at which its first header begins (a long name has one of its own)."""
    data: int
    size: int
    after: int
    archive: int
    """How many archives of the file ended before it."""


class Damaged(Exception):
    """This is no tar from here on."""

    def __init__(self, position: int, reason: str, *, is_cut: bool = False):
        super().__init__(reason)
        self.position, self.is_cut = position, is_cut


def check_start(file: IO[bytes], path: str, size: int, where: str) -> None:
    """Refuse what is not a tar."""
    file.seek(0)
    first = file.read(BLOCK)
    if size == 0 or not _is_header_or_end(first):
        raise DataError(f"{where}: '{path}' is not a tar file ({size:,} bytes): {why_no_shard(first, path)}")


def check_end(file: IO[bytes], path: str, size: int, where: str) -> None:
    """Refuse what was cut short (webdataset would end such a shard without a word), as far as the last bytes tell."""
    file.seek(max(0, size - BLOCK))
    if file.read(BLOCK) != ZEROS:
        raise DataError(f"{where}: shard '{path}' is cut short (no end-of-archive mark after {size:,} bytes); copy or make it again")


@dataclass
class Found:
    """What lies in a shard, in blocks of 512 bytes."""

    path: str
    where: str
    starts: list[int] = field(default_factory=list)
    """Where each sample begins."""
    end: int = 0
    """Where the last one ends."""
    archives: list[int] = field(default_factory=lambda: [0])
    """Where each archive begins: one, unless several were put behind one another."""
    _last: str | None = None
    _seen: dict[str, str] = field(default_factory=dict)

    def add(self, member: Member) -> None:
        """By webdataset's rule: consecutive members with one key are a sample."""
        if member.archive + 1 > len(self.archives):
            self.archives.append(member.start // BLOCK)
            self._last, self._seen = None, {}
        key = member_key(member)
        if key is None:
            return
        if key != self._last:
            self._new_sample(key, member.name[len(key) + 1 :])
            self.starts.append(member.start // BLOCK)
        self._last, self.end = key, member.after // BLOCK

    def _new_sample(self, key: str, extension: str) -> None:
        """A key that comes again with the same first member is the same sample twice; with another it is its other half."""
        first = self._seen.setdefault(key, extension)
        if first != extension:
            raise DataError(
                f"{self.where}: the members of '{key}' stand apart in shard '{self.path}' (.{first} and later .{extension}); they must "
                f"follow one another: write it sorted by name: `tar --sort=name -cf`"
            )


def scan(file: IO[bytes], size: int, path: str, where: str) -> Found:
    """Where each sample begins and where the last ends.

    Raises:
        DataError: it is damaged or cut short, or the members of a sample stand apart.
    """

    def read(position: int, length: int) -> bytes:
        file.seek(position)
        return file.read(length)

    found = Found(path, where)
    try:
        for member in members(read, size):
            found.add(member)
    except Damaged as damage:
        what = "is cut short" if damage.is_cut else f"is damaged at byte {damage.position:,}"
        raise DataError(f"{where}: shard '{path}' {what} ({damage}); copy or make it again") from None
    return found


def member_key(member: Member) -> str | None:
    """The sample that a member belongs to; None: to none (folders, links, names without an extension, `__meta__`)."""
    if not member.is_file or member.name.startswith("__"):
        return None
    name = KEY_AND_EXTENSION.match(member.name)
    return name[1] if name else None


def members(read: Read, size: int, *, is_piece: bool = False) -> Iterator[Member]:
    """The members of a file, archive by archive.

    Args:
        is_piece: members out of the middle of a tar, without an end-of-archive mark.

    Raises:
        Damaged: a header is broken or says what cannot be; or there is no end-of-archive mark.
    """
    position = archive = 0
    shared: dict[str, bytes] = {}
    while position < size:
        if read(position, BLOCK) != ZEROS:
            member = _member(read, position, size, archive, shared)
            yield member
            position = member.after
            continue
        following = None if is_piece else _next_archive(read, position, size)
        if following is None:
            return
        position, archive, shared = following, archive + 1, {}
    if not is_piece:
        raise Damaged(position, f"no end-of-archive mark after {size:,} bytes", is_cut=True)


def _member(read: Read, start: int, size: int, archive: int, shared: dict[str, bytes]) -> Member:
    """The member whose first header stands at `start`. Of several headers that name it the first counts, as in Python's tarfile."""
    said: dict[str, bytes] = {}
    position = start
    while True:
        header = _header(read, position)
        data = position + BLOCK
        if header.type not in EXTENSIONS:
            break
        _check_size(header.size, data, min(size, data + MOST_EXTENSION), position, "a long name or pax header")
        content = read(data, header.size)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            said.setdefault("path", content.split(b"\0", 1)[0])
        elif header.type in LOCAL_PAX:
            said = {**_pax(content, data), **said}
        elif header.type == tarfile.XGLTYPE:
            shared.update(_pax(content, data))
        position = _padded(data + header.size)
        if position >= size or read(position, BLOCK) == ZEROS:
            raise Damaged(start, "a long name or pax header without the member that it is for")
    said = {**shared, **said}
    name = said["path"].decode("utf-8", "surrogateescape") if "path" in said else header.name
    if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in said):
        raise Damaged(position, f"member '{name[:100]}' is stored sparse, which is not read; write the shard without `tar --sparse`")
    length = _number(said["size"], position) if "size" in said else header.size
    if not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
        length = 0  # folders and links have no content, whatever the header says
    _check_size(length, data, size, position, f"member '{name[:100]}'")
    return Member(name.rstrip("/"), header.isreg(), start, data, length, _padded(data + length), archive)


def _header(read: Read, position: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(read(position, BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise Damaged(position, str(error)) from None
    except (ValueError, ArithmeticError) as error:
        raise Damaged(position, f"bad header: {error}") from None


def _check_size(length: int, data: int, end: int, position: int, what: str) -> None:
    if length < 0 or data + length > end:
        raise Damaged(position, f"{what} says that it has {length:,} bytes; {max(0, end - data):,} can be there")


def _padded(position: int) -> int:
    return -(-position // BLOCK) * BLOCK


def _pax(content: bytes, position: int) -> dict[str, bytes]:
    """The records of a pax header: "LENGTH KEY=VALUE\\n" each."""
    records, place = {}, 0
    while place < len(content) and content[place]:
        record = PAX_RECORD.match(content, place)
        end = place + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(content) or content[end - 1] != ord("\n"):
            raise Damaged(position + place, "bad pax header")
        records[record[2].decode("utf-8", "replace")] = content[record.end() : end - 1]
        place = end
    return records


def _number(value: bytes, position: int) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", value):
        raise Damaged(position, f"a pax header gives the size {value[:30]!r}")
    return int(value)


def _next_archive(read: Read, position: int, size: int) -> int | None:
    """Where another archive begins behind the end-of-archive mark at `position`; None: the file ends."""
    if (second := read(position + BLOCK, BLOCK)) != ZEROS:
        if not second.strip(b"\0"):
            raise Damaged(position, "one block of zeros at its end; an archive ends with two", is_cut=True)
        raise Damaged(position, "a block of zeros between two members")
    place = position + 2 * BLOCK
    while place < size:
        piece = read(place, STEP)
        if not piece:
            return None
        if rest := piece.lstrip(b"\0"):
            place += (len(piece) - len(rest)) // BLOCK * BLOCK
            if not _is_header_or_end(read(place, BLOCK)):
                raise Damaged(place, "behind the end-of-archive mark stands what is no tar")
            return place
        place += len(piece)
    return None


def _is_header_or_end(block: bytes) -> bool:
    if block == ZEROS:
        return True
    try:
        _header(partial(_same, block), 0)
    except Damaged:
        return False
    return True


def _same(block: bytes, position: int, length: int) -> bytes:
    return block
