"""Unusable samples: skipped, counted, named in quarantine.jsonl, and fatal only when they are many."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from vlm_dist.errors import DataError
from vlm_dist.run_dir import read_jsonl

SMALLEST_BASE = 1000  # a share is not judged on fewer samples than this
HOPELESS = 50  # so many at the very start, and not one usable


class Quarantine:
    """Counts usable and unusable samples of one rank. Safe to use from the reading thread."""

    def __init__(self, path: Path, max_bad_fraction: float):
        self.path = path
        self.max_bad_fraction = max_bad_fraction
        self.num_good = 0
        self.num_bad = 0
        self.is_silent = False
        """Counts, and writes nothing: another rank has the same samples."""
        self._known = {(row["shard"], row["key"]) for row in read_jsonl(path)}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def count_good(self) -> None:
        self.num_good += 1

    def note(self, raw: dict[str, Any], reason: str) -> tuple[str, str]:
        """Name a sample in the file, once, without counting it; returns its shard and key."""
        place = (str(raw.get("__url__", "")), str(raw.get("__key__", "")))
        with self._lock:
            if place not in self._known:
                self._known.add(place)
                if self.is_silent:
                    return place
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"shard": place[0], "key": place[1], "reason": reason}) + "\n")
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
