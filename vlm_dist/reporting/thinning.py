"""The steps of a run for its page: all of them, or of very many the extremes and the mean of each group, read as the file grows.

A group is so many consecutive steps; of each the rows are kept that hold the lowest or highest value of anything that is measured, so that
no spike is lost, and the mean of all. Sums and totals are of every step. Memory does not grow with the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_dist.run_dir import json_row

MOST_GROUPS = 400
PIECE = 2**22  # bytes of the file that are read at a time
NUMBER = (int, float)
OF_A_STEP = ("step", "samples", "tokens", "lr", "step_s", "data_wait_s", "tokens_per_s", "padding_fraction", "peak_memory_bytes")
MAY_BE_NONE = ("loss", "grad_norm")  # of a step that was left out
OF_A_SCORE = {"exact_match": NUMBER, "samples": int, "by_kind": dict}


@dataclass
class Group:
    """Some consecutive steps."""

    count: int = 0
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Those that hold an extreme, by step."""
    lowest: dict[str, tuple[float, int]] = field(default_factory=dict)
    highest: dict[str, tuple[float, int]] = field(default_factory=dict)
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        step, lowest, highest, sums = row["step"], self.lowest, self.highest, self.sums
        self.count += 1
        kept = False
        for name, value in leaves(row):
            if name not in sums:
                lowest[name] = highest[name] = (value, step)
                sums[name], kept = (value, 1), True
                continue
            total, number = sums[name]
            sums[name] = (total + value, number + 1)
            if value < lowest[name][0]:
                lowest[name], kept = (value, step), True
            elif value > highest[name][0]:
                highest[name], kept = (value, step), True
        if kept:
            self.rows[step] = row
            if len(self.rows) > 4 * len(sums):
                self._forget()

    def join(self, other: Group) -> Group:
        """This one and the next as one."""
        names = dict.fromkeys([*self.sums, *other.sums])
        none = (0.0, 0)
        made = Group(self.count + other.count, {**self.rows, **other.rows})
        for name in names:
            made.lowest[name] = min(one.lowest[name] for one in (self, other) if name in one.lowest)
            made.highest[name] = max(one.highest[name] for one in (self, other) if name in one.highest)
            (a, m), (b, n) = self.sums.get(name, none), other.sums.get(name, none)
            made.sums[name] = a + b, m + n
        made._forget()
        return made

    def mean(self) -> dict[str, Any]:
        """A row of means, in the form of a step's."""
        made: dict[str, Any] = dict.fromkeys(MAY_BE_NONE)
        for name, (total, number) in self.sums.items():
            first, _, inner = name.partition("\0")
            if inner:
                made.setdefault(first, {})[inner] = total / number
            else:
                made[name] = total / number
        return made

    def _forget(self) -> None:
        held = {step for side in (self.lowest, self.highest) for _, step in side.values()}
        self.rows = {step: self.rows[step] for step in sorted(held)}


class Metrics:
    """metrics.jsonl of a run, read on as often as `update` is called."""

    def __init__(self, path: Path):
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self._place, self._file, self._rest = 0, None, b""
        self.groups: list[Group] = []
        self.width, self.count, self.odd = 1, 0, 0
        self.scores: list[dict[str, Any]] = []
        self.seconds = self.waited = self.padding = 0.0
        self.peak_bytes = 0
        self.last: dict[str, Any] = {}

    def update(self) -> Metrics:
        """Read what was written since; all anew where the file was written anew. A last line that was cut off waits."""
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                if (found.st_dev, found.st_ino) != self._file or found.st_size < self._place:
                    self._begin()
                    self._file = found.st_dev, found.st_ino
                file.seek(self._place)
                while piece := file.read(PIECE):
                    self._place += len(piece)
                    *lines, self._rest = (self._rest + piece).split(b"\n")
                    for line in lines:
                        self._take(line)
                if isinstance(json_row(self._rest), dict):  # whole but for its end
                    self._take(self._rest)
                    self._rest = b""
        except OSError:  # not there yet, or not readable: no steps
            self._begin()
        return self

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The steps that are kept: all, where `width` is 1."""
        return [row for group in self.groups for row in group.rows.values()]

    @property
    def means(self) -> list[dict[str, Any]]:
        """A row for each group."""
        return self.rows if self.width == 1 else [group.mean() for group in self.groups]

    def _take(self, line: bytes) -> None:
        if not line:
            return
        row = json_row(line)
        if is_score(row):
            self.scores.append(row)
        elif not is_step(row):
            self.odd += 1
        else:
            self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        self.count, self.last = self.count + 1, row
        self.seconds, self.waited = self.seconds + row["step_s"], self.waited + row["data_wait_s"]
        self.padding += row["padding_fraction"]
        self.peak_bytes = max(self.peak_bytes, row["peak_memory_bytes"])
        if not self.groups or self.groups[-1].count >= self.width:
            if len(self.groups) >= 2 * MOST_GROUPS:
                self.groups = [a.join(b) for a, b in zip(self.groups[::2], self.groups[1::2], strict=True)]
                self.width *= 2
            self.groups.append(Group())
        self.groups[-1].add(row)


def leaves(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a row; of a nested one by "NAME\\0INNER"."""
    for name, value in row.items():
        if isinstance(value, NUMBER):
            yield name, value
        elif isinstance(value, dict):
            for inner, more in value.items():
                if isinstance(more, NUMBER):
                    yield f"{name}\0{inner}", more


def is_step(row: Any) -> bool:
    """Whether a line holds what every step has."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), NUMBER) for name in OF_A_STEP):
        return False
    return all(name in row and isinstance(row[name], (*NUMBER, type(None))) for name in MAY_BE_NONE)


def is_score(row: Any) -> bool:
    """Whether a line is that of an evaluation."""
    if not isinstance(row, dict) or not isinstance(row.get("eval"), dict) or not isinstance(row.get("step"), NUMBER):
        return False
    return row.get("phase") in ("before", "during", "after") and all(isinstance(row["eval"].get(k), kind) for k, kind in OF_A_SCORE.items())


def extremes(x: list[float], y: list[float], groups: int = MOST_GROUPS) -> tuple[list[float], list[float]]:
    """The points of a curve, or of very many the first, lowest, highest and last of each group, in order."""
    width = -(-len(x) // groups)
    if width <= 4:
        return x, y
    kept: list[int] = []
    for begin in range(0, len(x), width):
        places = range(begin, min(begin + width, len(x)))
        kept += sorted({places[0], min(places, key=y.__getitem__), max(places, key=y.__getitem__), places[-1]})
    return [x[place] for place in kept], [y[place] for place in kept]
