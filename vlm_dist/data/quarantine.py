"""Unusable samples: skipped, counted, named in quarantine.jsonl, and fatal only when they are many."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from vlm_dist.errors import DataError
from vlm_dist.run_dir import json_row

SMALLEST_BASE = 1000  # a share is not judged on fewer samples than this
HOPELESS = 50  # so many at the very start, and not one usable


class Quarantine:
    """Counts usable and unusable samples of one rank, and names them in a file that all ranks of a run share. Safe to use from the reading
    thread."""

    def __init__(self, path: Path, max_bad_fraction: float):
        self.path = path
        self.max_bad_fraction = max_bad_fraction
        self.num_good = 0
        self.num_bad = 0
        self.is_silent = False
        """Counts, and writes nothing: another rank has the same samples."""
        self._known: set[tuple[str, str]] = set()
        self._read = 0  # bytes of the file
        self._lock = threading.Lock()
        len(self)  # what an earlier start found

    def __len__(self) -> int:
        """Samples named, by any rank."""
        with self._lock:
            with suppress(OSError), self.path.open("rb") as file:  # not there yet; run_mend.py tells of one that cannot be read
                self._look(file)
            return len(self._known)

    def _look(self, file: BinaryIO) -> None:
        """What other ranks have written since."""
        if file.seek(0, os.SEEK_END) < self._read:  # it was begun anew
            self._read = 0
        file.seek(self._read)
        lines = file.read().split(b"\n")
        self._read = file.tell() - len(lines.pop())  # a line that is being written is read the next time
        rows = [row for row in map(json_row, lines) if isinstance(row, dict)]
        self._known |= {(str(row.get("shard")), str(row.get("key"))) for row in rows}

    def count_good(self) -> None:
        self.num_good += 1

    def note(self, raw: dict[str, Any], reason: str) -> tuple[str, str]:
        """Name a sample in the file, once, without counting it; returns its shard and key."""
        place = (str(raw.get("__url__", "")), str(raw.get("__key__", "")))
        with self._lock:
            if place in self._known or self.is_silent:
                self._known.add(place)
                return place
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                with suppress(OSError):  # a file system that knows no locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # till the file is closed
                self._look(file)
                if place not in self._known:
                    file.write(b"\n" if file.tell() != self._read else b"")  # behind a line that a kill has cut off
                    file.write(json.dumps({"shard": place[0], "key": place[1], "reason": reason}).encode() + b"\n")
                    self._read = file.tell()
            self._known.add(place)
        return place

    def add(self, raw: dict[str, Any], reason: str) -> None:
        """Name the sample in the file, once.

        Raises:
            DataError: too many samples are unusable.
        """
        self.num_bad += 1
        place = self.note(raw, reason)
        seen = self.num_good + self.num_bad
        if self.num_good == 0 and self.num_bad >= HOPELESS:
            raise DataError(
                f"data: none of the first {seen} samples is usable; the last ({place[1]}): {reason}; all are named in {self.path}"
            )
        if self.num_bad > self.max_bad_fraction * max(seen, SMALLEST_BASE):
            raise DataError(
                f"data: {self.num_bad} of {seen} samples are unusable, more than data.max_bad_fraction={self.max_bad_fraction}; "
                f"the last ({place[1]}): {reason}; all are named in {self.path}"
            )
