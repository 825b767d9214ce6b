"""Ranges of remote shards as files on a local disk: each is fetched once, and the least recently read go when there are too many."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from vlm_dist.errors import DataError

logger = logging.getLogger(__name__)

DOWNLOADS = 8  # ranges fetched at a time
Fetch = Callable[[str, int, int], bytes]


class RangeCache:
    """Safe to use from several threads, and by several ranks of a machine in one folder.

    Args:
        limit: bytes that the folder may hold.

    Raises:
        DataError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_dir: '{folder}' cannot be made ({error.strerror}); give a folder that can be written") from None
        self._bytes = sum(file.stat().st_size for file in folder.glob("*.range"))
        self._lock = threading.Lock()
        self._coming: dict[Path, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(DOWNLOADS, "fetch")

    def read(self, path: str, stamp: str, whole: tuple[int, int], start: int, length: int, fetch: Fetch) -> bytes:
        """Bytes [start, start + length) out of the range `whole` (start, length), which is fetched if it is not here.

        Args:
            stamp: changes when the file behind the address is written anew.
        """
        file = self._file(path, stamp, whole)
        if (data := _pread(file, start - whole[0], length)) is not None:
            return data
        data = self._begin(file, path, whole, fetch).result()
        return data[start - whole[0] : start - whole[0] + length]

    def prefetch(self, path: str, stamp: str, whole: tuple[int, int], fetch: Fetch) -> None:
        """Begin to fetch a range, unless it is here or coming."""
        file = self._file(path, stamp, whole)
        if not file.exists():
            self._begin(file, path, whole, fetch)

    def close(self) -> None:
        """Wait for what is being fetched; begin nothing more."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, file: Path, path: str, whole: tuple[int, int], fetch: Fetch) -> Future[bytes]:
        def work() -> bytes:
            try:
                if (data := _pread(file, 0, whole[1])) is not None:
                    return data
                with self._alone(file):
                    if (data := _pread(file, 0, whole[1])) is None:
                        data = fetch(path, *whole)
                        self._put(file, data)
                return data
            finally:
                with self._lock:
                    self._coming.pop(file, None)

        with self._lock:
            if file not in self._coming:
                self._coming[file] = self._pool.submit(work)
            return self._coming[file]

    @contextmanager
    def _alone(self, file: Path) -> Iterator[None]:
        """Among the processes of this machine that fetch a range; where the file system knows no locks it may be fetched twice."""
        lock = None
        with suppress(OSError):
            lock = (self.folder / f".lock-{file.name[:2]}").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

    def _put(self, file: Path, data: bytes) -> None:
        temporary = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            temporary.write_bytes(data)
            temporary.replace(file)
        except OSError as error:
            logger.warning("data.cache_dir: %s cannot be written (%s); going on without it", file, error.strerror)
            temporary.unlink(missing_ok=True)
            return
        with self._lock:
            self._bytes += len(data)
            if self._bytes > self.limit:
                self._bytes = self._make_room()

    def _make_room(self) -> int:
        """Down to nine tenths of the limit, so that it is not done for every file; returns the bytes that stay."""
        files = []
        for file in self.folder.glob("*.range"):
            try:
                status = file.stat()
            except OSError:  # another rank made room
                continue
            files.append((status.st_mtime_ns, status.st_size, file))
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= 0.9 * self.limit:
                break
            file.unlink(missing_ok=True)
            total -= size
        return total

    def _file(self, path: str, stamp: str, whole: tuple[int, int]) -> Path:
        return self.folder / f"{hashlib.sha256(f'{path} {stamp} {whole}'.encode()).hexdigest()[:32]}.range"


def _pread(file: Path, start: int, length: int) -> bytes | None:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return None
    try:
        os.utime(descriptor)
        data = os.pread(descriptor, length, start)
    finally:
        os.close(descriptor)
    return data if len(data) == length else None
