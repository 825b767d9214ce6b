"""Files that are neither shards nor records, by their first bytes, and what to do with them."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from vlm_dist.data.pictures import HEIC, PICTURE_STARTS, picture_extension, what_it_is

USTAR = slice(257, 262)  # where a tar says that it is one
UNPACK = {b"\x1f\x8b": "gunzip -k", b"BZh": "bunzip2 -k", b"\xfd7zXZ": "unxz -k", b"\x28\xb5\x2f\xfd": "unzstd"}
ARCHIVES = {b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}


def why_no_shard(first: bytes, path: str) -> str:
    """What a file in the place of a shard is, and what to do with it, in words.

    Args:
        first: its first 512 bytes or more.
    """
    if unpack := _starts(first, UNPACK):
        return f"is compressed, and samples are read at their places in a plain tar; unpack it: {unpack} '{path}'"
    if kind := _starts(first, ARCHIVES):
        return f"is a {kind} file; unpack it, and write shards of the folder: vlm-dist data pack FOLDER OUT"
    if what := _picture(first):
        return f"is {what}; write shards of pictures and their texts: vlm-dist data pack FOLDER OUT"
    if first[:4] == b"PAR1" or first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return f"holds records, not samples in a tar; write shards of them: vlm-dist data pack '{path}' OUT"
    return "expected an uncompressed tar shard of image-text samples"


def why_no_source(path: Path) -> str | None:
    """What a file is that `data pack` does not read, and what to do with it, in words; None: it may be read."""
    with path.open("rb") as file:
        first = file.read(4096)
    if kind := _starts(first, ARCHIVES):
        return f"is a {kind} file; unpack it into a folder, and give the folder"
    unpack = _starts(first, UNPACK)
    if unpack and (not first.startswith(b"\x1f\x8b") or _begins_as_tar(path)):
        return f"is compressed; unpack it ({unpack} '{path}'), and give what comes out"
    if what := _picture(first):
        return f"is {what}; give the folder of pictures and texts that it lies in, or the file of records that names it"
    return None


def is_tar(path: Path) -> bool:
    """Whether a file is an uncompressed tar, whatever its name."""
    with path.open("rb") as file:
        return file.read(512)[USTAR] == b"ustar"


def _begins_as_tar(path: Path) -> bool:
    try:
        with gzip.open(path) as file:
            return file.read(512)[USTAR] == b"ustar"
    except (OSError, EOFError, zlib.error):
        return False


def _picture(first: bytes) -> str | None:
    is_one = picture_extension(first) or first.startswith(PICTURE_STARTS[:1] + PICTURE_STARTS[2:]) or what_it_is(first) == HEIC
    return {"jpg": "a JPEG", "png": "a PNG", "webp": "a WebP"}.get(picture_extension(first) or "", what_it_is(first)) if is_one else None


def _starts(first: bytes, kinds: dict[bytes, str]) -> str | None:
    return next((words for start, words in kinds.items() if first.startswith(start)), None)
