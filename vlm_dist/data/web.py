"""Ranges of files on http(s) servers, through fsspec's session: what such servers do wrong is told by its name."""

from __future__ import annotations

import email.utils
import io
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from vlm_dist.data.addresses import is_inside, redirect_problem, shown
from vlm_dist.errors import DataError

BLOCK = 4 * 2**20  # bytes that a RangeFile reads at a time
LONGEST_ASKED_S = 120.0  # a server's Retry-After counts up to this


def read_range(system: Any, address: str, start: int, length: int) -> bytes:
    """Bytes [start, start + length) of a file.

    Args:
        system: fsspec's file system of http(s).

    Raises:
        DataError: the server sends whole files only.
        Exception: what aiohttp raises; fewer bytes are a ConnectionError.
    """
    from fsspec.asyn import sync

    return sync(system.loop, _read_range, system, address, start, length)


async def _read_range(system: Any, address: str, start: int, length: int) -> bytes:
    headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
    session = await system.set_session()
    async with session.get(system.encode_url(address), headers=headers) as answer:
        answer.raise_for_status()
        if answer.status != 206 and (start or (answer.content_length or 0) > length):
            raise _no_ranges(address)
        if answer.status == 206 and not answer.headers.get("Content-Range", f"bytes {start}-").startswith(f"bytes {start}-"):
            raise ConnectionError(f"bytes from {start:,} were asked for, the server sends '{answer.headers['Content-Range'][:60]}'")
        data = bytearray()
        while len(data) <= length and (piece := await answer.content.read(length + 1 - len(data))):
            data += piece
    if len(data) > length:
        raise _no_ranges(address)
    if len(data) < length:
        raise ConnectionError(f"{len(data):,} bytes came, {length:,} were asked for")
    return bytes(data)


def _no_ranges(address: str) -> DataError:
    return DataError(
        f"data: '{address}': the server sends whole files, not the ranges that it is asked for; set data.cache_whole: true, which "
        "fetches each shard once, whole, into the cache, or use a server that knows ranges (Accept-Ranges: bytes)"
    )


def client_maker(is_named: Callable[[str], bool]) -> Any:
    """For fsspec's `get_client`: sessions that follow no redirect which `redirect_problem` refuses.

    Args:
        is_named: whether the user wrote this host; all others must not lie inside a network.
    """

    async def get_client(**options: Any) -> Any:
        import aiohttp

        class Resolver(aiohttp.ThreadedResolver):
            async def resolve(self, host: str, *arguments: Any, **options: Any) -> Any:
                found = await super().resolve(host, *arguments, **options)
                if not is_named(host) and (inside := [one["host"] for one in found if is_inside(one["host"])]):
                    raise DataError(f"data: a server sends on to '{host}', which leads to {inside[0]}, inside a network; not followed")
                return found

        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(_check_redirect)
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=Resolver()), trace_configs=[trace], **options)

    return get_client


async def _check_redirect(_session: Any, _context: Any, params: Any) -> None:
    source, answer = str(params.response.url), params.response
    target = urllib.parse.urljoin(source, answer.headers.get("Location") or answer.headers.get("URI") or "")
    if problem := redirect_problem(source, target):
        raise DataError(
            f"data: '{shown(source)}': the server sends on to '{shown(target)}', and {problem}; not followed. If you trust it, give that "
            "address, or copy the shards here"
        )


def asked_pause(error: BaseException) -> float:
    """Seconds that a server asks to wait (Retry-After: a number or a date), up to `LONGEST_ASKED_S`; 0: it does not."""
    value = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    if value.isdecimal() and len(value) < 10:
        return min(float(value), LONGEST_ASKED_S)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return 0.0
    return min(max(0.0, date.timestamp() - time.time()), LONGEST_ASKED_S)


class RangeFile(io.RawIOBase):
    """A remote file to seek and read in, a block at a time.

    Args:
        fetch: (start, length) -> bytes.
    """

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]):
        self.size, self.fetch = size, fetch
        self._place = self._start = 0
        self._block = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        if self._place >= self.size:
            return 0
        if not self._start <= self._place < self._start + len(self._block):
            self._block, self._start = self.fetch(self._place, min(BLOCK, self.size - self._place)), self._place
        begin = self._place - self._start
        piece = self._block[begin : begin + len(buffer)]
        buffer[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)
