"""What each lane puts into its row of the next step: one sample, or as many as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from vlm_dist.data.lanes import Draw, Lane
from vlm_dist.data.lengths import Length
from vlm_dist.data.packing import choose, of_similar_length
from vlm_dist.errors import BadSample


@dataclass
class Slot:
    """A drawn sample on its way into a row."""

    draw: Draw
    raw: dict[str, Any] | None = None
    """Its files, if they were read already."""
    length: Length | None = None
    problem: BadSample | None = None


class Rows(Protocol):
    """The rows of one lane, one a step."""

    lane: Lane

    def next(self) -> list[Slot]:
        """The samples of the next row; none where the lane has had all its epochs."""
        ...

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue behind the rows given so far."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


class PlainRows:
    """One sample a row, in the order of the lane."""

    def __init__(self, lane: Lane):
        self.lane = lane

    def next(self) -> list[Slot]:
        draw = self.lane.draw()
        return [] if draw is None else [Slot(draw)]

    def state(self) -> dict[str, Any]:
        return {"counts": list(self.lane.counts)}

    def restore(self, state: dict[str, Any]) -> None:
        self.lane.counts = list(state["counts"])


class MeasuredRows:
    """Rows chosen among the next samples by their lengths: packed, or one sample of about the length of other lanes' samples.

    Samples of an epoch are not mixed with those of the next, so that each epoch is whole; in a mixture, whose data sets have epochs of
    their own, there is no such cut.

    Args:
        measure: begins to read a drawn sample and to find its length; a sample that cannot be used comes back with its problem.
        pack: False: one sample a row.
        limit: tokens of a row.
        lookahead: samples that are chosen among.
        discard: told of each sample that cannot be used.
    """

    def __init__(
        self,
        lane: Lane,
        measure: Callable[[Draw], Future[Slot]],
        discard: Callable[[Slot], None],
        *,
        pack: bool,
        limit: int,
        most_patches: int | None,
        lookahead: int,
    ):
        self.lane, self.measure, self.discard = lane, measure, discard
        self.pack, self.limit, self.most_patches, self.lookahead = pack, limit, most_patches, lookahead
        self._coming: list[tuple[Draw, Future[Slot]]] = []
        self._waiting: list[Slot] = []
        self._tokens = self._patches = self._rows = 0

    def next(self) -> list[Slot]:
        self._fill()
        if not self._waiting:
            return []
        lengths = [slot.length or Length(0, 0) for slot in self._waiting]
        self._rows += 1
        if self.pack:
            ratio = self._patches / max(1, self._tokens)
            chosen = choose(lengths, self.limit, ratio, self.most_patches, f"{self.lane.seed}/pack/{self.lane.number}/{self._rows}")
        else:
            chosen = [of_similar_length(lengths, f"{self.lane.seed}/length/{self._rows}")]
        row = [self._waiting[number] for number in chosen]
        taken = set(chosen)
        self._waiting = [slot for number, slot in enumerate(self._waiting) if number not in taken]
        return row

    def state(self) -> dict[str, Any]:
        """Draws so far, and which of them wait: by data set and ordinal."""
        waiting = [[slot.draw.dataset, slot.draw.ordinal] for slot in self._waiting]
        counts = list(self.lane.counts)
        for draw, _ in self._coming:  # not measured yet: to be drawn again
            counts[draw.dataset] -= 1
        return {"counts": counts, "waiting": waiting, "sums": [self._tokens, self._patches, self._rows]}

    def restore(self, state: dict[str, Any]) -> None:
        self.lane.counts = list(state["counts"])
        self._tokens, self._patches, self._rows = state["sums"]
        self._coming = []
        futures = [self.measure(self.lane.again(dataset, ordinal)) for dataset, ordinal in state["waiting"]]
        self._waiting = [future.result() for future in futures]

    def _fill(self) -> None:
        """Until `lookahead` usable samples wait, or the epoch is over; some more are being read meanwhile."""
        while len(self._waiting) < self.lookahead:
            self._begin(self.lookahead - len(self._waiting) + self.lookahead // 2)
            if not self._coming or (self._waiting and self._is_new_epoch(self._coming[0][0])):
                return
            _, future = self._coming.pop(0)
            slot = future.result()
            if slot.problem is not None or slot.length is None:
                self.discard(slot)
                continue
            self._tokens += slot.length.tokens
            self._patches += slot.length.patches
            self._waiting.append(slot)

    def _begin(self, count: int) -> None:
        while len(self._coming) < count and (draw := self.lane.draw()) is not None:
            self._coming.append((draw, self.measure(draw)))

    def _is_new_epoch(self, draw: Draw) -> bool:
        return len(self.lane.orders) == 1 and draw.epoch != self._waiting[0].draw.epoch


def skip(rows: Rows, count: int) -> None:
    """Pass over rows without encoding them."""
    for _ in range(count):
        rows.next()


def until_done(rows: Rows) -> Iterator[list[Slot]]:
    """The rows of a lane that has an end."""
    while row := rows.next():
        yield row
