"""Bytes of shards, wherever they lie: local files, and through fsspec whatever it reads (http, https, s3, gs, hf, ...).

Remote bytes are read in ranges. What fails in passing (a 5xx answer, a cut connection, a slow server) is tried again with growing
pauses; it never makes a sample unusable. Where a server says how long to wait (Retry-After), that long.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from vlm_dist.data.cache import RangeCache
from vlm_dist.data.web import RangeFile, asked_pause, client_maker, read_range
from vlm_dist.disk import FULL, cache_folder
from vlm_dist.errors import DataError

logger = logging.getLogger(__name__)

MOST_OPEN_FILES = 128
ATTEMPTS = 6
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
WEB = ("http://", "https://")
INSTALL = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}

T = TypeVar("T")


def is_remote(path: str) -> bool:
    """Whether it is an address rather than a path."""
    return "://" in path


class Storage:
    """Reads ranges of shards; safe to use from several threads.

    Args:
        cache: keeps what was fetched of remote shards; None: nothing is kept.
        timeout_s: longest wait for one answer of a remote server.
        whole: fetch remote files whole, once, and read them here: for servers that know no ranges.
    """

    def __init__(self, cache: RangeCache | None = None, timeout_s: float = 60.0, *, whole: bool = False):
        self.cache, self.timeout_s, self.whole = cache, timeout_s, whole
        self.fetched_bytes = 0
        """Bytes that came over the network."""
        self.retries = 0
        self._files: OrderedDict[str, IO[bytes]] = OrderedDict()
        self._systems: dict[str, Any] = {}
        self._stamps: dict[str, str] = {}
        self._copies: dict[str, str] = {}
        self._copying = threading.Lock()
        self._hosts: set[str] = set()
        self._lock = threading.Lock()

    def read(self, path: str, start: int, length: int, around: tuple[int, int] | None = None) -> bytes:
        """Bytes [start, start + length).

        Args:
            around: (start, length) of a larger range; of a remote shard all of it is fetched and kept, if there is a cache.

        Raises:
            DataError: the file is shorter, gone, or stayed unreachable.
        """
        path = self._here(path)
        if not is_remote(path):
            return self._read_local(path, start, length)
        if self.cache is None or around is None:
            return self._fetch(path, start, length)
        return self.cache.read(path, self._stamp_of(path), around, start, length, self._fetch)

    def prefetch(self, path: str, start: int, length: int) -> None:
        """Begin to fetch a range of a remote shard into the cache."""
        if self.cache is not None and is_remote(path) and not self.whole:
            self.cache.prefetch(path, self._stamp_of(path), (start, length), self._fetch)

    def close(self) -> None:
        """Fetch nothing more ahead."""
        if self.cache is not None:
            self.cache.close()

    def open(self, path: str) -> IO[bytes]:
        """A file to seek and read in, remote ones with reading ahead.

        Raises:
            DataError: there is none, or (while it is read) it stayed unreachable.
        """
        path = self._here(path)
        if not is_remote(path):
            return Path(path).open("rb")
        size, _ = self.stamp(path, "data")
        return io.BufferedReader(RangeFile(size, lambda start, length: self._fetch(path, start, length)))

    def stamp(self, path: str, where: str) -> tuple[int, str]:
        """A file's bytes, and what changes when it is written anew.

        Raises:
            DataError: there is no such file.
        """
        if not is_remote(path):
            try:
                status = os.stat(path)
            except OSError as error:
                raise DataError(f"{where}: shard '{path}' cannot be opened ({error.strerror}); check the pattern") from None
            return status.st_size, str(status.st_mtime_ns)
        about = self._retry(path, lambda: self._system(path).info(path))
        if about.get("size") is None:
            raise DataError(f"{where}: the server does not tell the size of '{path}'; use one that does, or copy the shards here")
        return int(about["size"]), str(about.get("ETag") or about.get("LastModified") or about.get("mtime") or "")

    def find(self, pattern: str) -> list[str]:
        """The remote files that an address or a glob names, in order. Whether a file without a glob is there, reading it will tell:
        servers that fail in passing would make it seem gone."""
        scheme, _, rest = pattern.partition("://")
        self._system(pattern)
        if not any(char in rest for char in "*?["):
            return [pattern]
        found = self._retry(pattern, lambda: self._system(pattern).glob(pattern))
        return sorted(path if is_remote(path) else f"{scheme}://{path}" for path in found)

    def local_copy(self, path: str) -> Path | None:
        """A path of this machine with the file's content; None: there is no such file."""
        if not is_remote(path):
            return Path(path) if os.path.isfile(path) else None
        try:
            size, stamp = self.stamp(path, "data")
        except _Gone:
            return None
        copy = cache_folder() / "files" / hashlib.sha256(f"{path} {size} {stamp}".encode()).hexdigest()[:32]
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            temporary = copy.with_name(f".{copy.name}.{os.getpid()}.{threading.get_ident()}")
            try:
                self._retry(path, lambda: self._system(path).get_file(path, str(temporary)))
                temporary.replace(copy)
            finally:
                temporary.unlink(missing_ok=True)
        return copy

    def upload(self, file: Path, path: str) -> None:
        """Copy a file to an address.

        Raises:
            DataError: nothing can be written there.
        """
        try:
            self._retry(path, lambda: self._system(path).put_file(str(file), path))
        except (DataError, NotImplementedError) as error:
            raise DataError(f"{path}: cannot be written ({str(error)[:200]}); give a folder with --out and copy it there by hand") from None

    def _here(self, path: str) -> str:
        """Where to read a file: its copy, if it is to be fetched whole."""
        if not self.whole or not is_remote(path):
            return path
        with self._copying:
            if path not in self._copies:
                copy = self.local_copy(path)
                if copy is None:
                    raise DataError(f"data: '{path}' cannot be read (it is not there); check the address and your credentials")
                self._copies[path] = str(copy)
            return self._copies[path]

    def _read_local(self, path: str, start: int, length: int) -> bytes:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                try:
                    file = self._files[path] = Path(path).open("rb", buffering=0)  # noqa: SIM115 (kept open)
                except OSError as error:
                    raise DataError(f"data: shard '{path}' cannot be opened ({error.strerror}); it was there when the run began") from None
            self._files.move_to_end(path)
            if len(self._files) > MOST_OPEN_FILES:
                self._files.popitem(last=False)  # closed when no other thread reads from it
        data = os.pread(file.fileno(), length, start)
        if len(data) < length:
            raise DataError(f"data: shard '{path}' ends at byte {start + len(data):,}, it was longer when the run began; restore it")
        return data

    def _stamp_of(self, path: str) -> str:
        if path not in self._stamps:
            self._stamps[path] = self.stamp(path, "data")[1]
        return self._stamps[path]

    def _fetch(self, path: str, start: int, length: int) -> bytes:
        def fetch() -> bytes:
            system = self._system(path)
            if path.startswith(WEB):
                return read_range(system, path, start, length)
            data = system.cat_file(path, start=start, end=start + length)
            if len(data) != length:
                raise ConnectionError(f"{len(data):,} bytes came, {length:,} were asked for")
            return data

        data = self._retry(path, fetch)
        self.fetched_bytes += length
        return data

    def _system(self, path: str) -> Any:
        """The fsspec file system of an address."""
        import fsspec

        scheme = path.split("://", 1)[0]
        with self._lock:
            self._hosts.add(urllib.parse.urlsplit(path).hostname or "")
            if scheme not in self._systems:
                try:
                    self._systems[scheme] = fsspec.filesystem(scheme, skip_instance_cache=True, **self._options(scheme))
                except ImportError:
                    package = INSTALL.get(scheme, f"fsspec's package for {scheme}")
                    raise DataError(f"data: '{path}' needs the package {package}, which is not installed; pip install {package}") from None
                except ValueError as error:
                    raise DataError(f"data: '{path}': {error}; give a path, or an address with s3://, gs://, hf:// or https://") from None
            return self._systems[scheme]

    def _options(self, scheme: str) -> dict[str, Any]:
        """Time limits, in the words of each file system."""
        if scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(sock_connect=self.timeout_s, sock_read=self.timeout_s)
            return {"client_kwargs": {"timeout": timeout}, "get_client": client_maker(lambda host: host.lower() in self._hosts)}
        if scheme == "s3":
            return {"config_kwargs": {"connect_timeout": self.timeout_s, "read_timeout": self.timeout_s}}
        return {}

    def _retry(self, path: str, action: Callable[[], T]) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action()
            except (DataError, NotImplementedError):
                raise
            except Exception as error:
                cause = _cause(error)
                if isinstance(cause, DataError) or getattr(cause, "errno", None) in FULL:
                    raise cause from None
                reason = _words(cause)
                is_gone = isinstance(error, FileNotFoundError | PermissionError) and not _may_pass(cause)
                if is_gone or getattr(cause, "status", None) in (404, 410):
                    raise _Gone(f"data: '{path}' cannot be read ({reason}); check the address and your credentials") from None
                if attempt == ATTEMPTS or not _may_pass(cause):
                    raise DataError(f"data: '{path}' cannot be read after {attempt} attempts; the last: {reason}") from error
                pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
                pause = max(pause, asked_pause(cause))
                self.retries += 1
                logger.warning("data: %s: %s; trying again in %.1f s (attempt %d of %d)", path, reason, pause, attempt + 1, ATTEMPTS)
                time.sleep(pause)
        raise AssertionError("unreachable")


class _Gone(DataError):
    """There is no such file, or it is not for us."""


def _cause(error: BaseException) -> BaseException:
    """What really happened: fsspec says that a file is not found also where its server failed, or could not be reached."""
    import aiohttp

    is_veil = isinstance(error, FileNotFoundError | PermissionError)
    return error.__cause__ if is_veil and isinstance(error.__cause__, aiohttp.ClientError | OSError | DataError) else error


def _words(error: BaseException) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answers {status} {getattr(error, 'message', '')}".strip()[:300]
    if isinstance(error, FileNotFoundError | PermissionError):
        return type(error).__name__
    return (f"{type(error).__name__}: {error}".strip(": ").splitlines() or [""])[0][:300]


def _may_pass(error: BaseException) -> bool:
    """Whether trying again can help: not where the server understood and refused."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429))
