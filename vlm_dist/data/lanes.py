"""Which sample comes when: arithmetic on numbers, without reading anything.

A lane is one row of the global batch: L = training.global_batch lanes, whatever the number of ranks. Rank r of W owns lanes
r L / W ... (r + 1) L / W - 1. Nothing that a lane does depends on W, so what an optimizer step holds depends on the data, the seed
and L alone, and a run may stop on 8 ranks and go on with 2.

The m-th draw of lane l has place p = m L + l in an endless row of epochs of N samples each: it belongs to epoch p // N. So an epoch
ends in the middle of a step if it must, the next begins in the lane behind, nobody waits, and every sample comes exactly once an epoch.
Within an epoch blocks of neighbouring samples (one range of a shard) are permuted, each lane gets a run of that order, as long as its
draws of the epoch, and a run is shuffled in windows. Every permutation is a function of (seed, epoch, lane, window), so the m-th sample
of a lane is looked up, not walked to.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

LARGEST_BLOCK = 64  # samples: neighbours in a shard that are fetched as one range
BLOCKS_A_LANE = 64  # smaller sets get smaller blocks, so that a lane always mixes this many


class Draw(NamedTuple):
    """One sample as a lane draws it."""

    dataset: int
    ordinal: int
    """How many samples of the data set this lane drew before."""
    epoch: int
    number: int
    """The sample's number in the data set's index."""


class Order:
    """The order of one data set: `draw(lane, ordinal)` is the sample that a lane draws from it after `ordinal` others.

    Args:
        counts: samples a shard, [S].
        lanes: L.
        window: samples that are shuffled among one another.
        salt: keeps the orders of several data sets apart.
    """

    def __init__(self, counts: np.ndarray, lanes: int, seed: int, window: int, salt: str = ""):
        import numpy as np

        self.num_samples, self.lanes, self.window = int(counts.sum()), lanes, window
        self.key = f"{seed}/{salt}"
        self.block = max(1, min(LARGEST_BLOCK, self.num_samples // (lanes * BLOCKS_A_LANE)))
        blocks = -(-counts // self.block)
        shard_of_block = np.repeat(np.arange(len(counts)), blocks)
        within = np.arange(len(shard_of_block)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
        self._block_first = (np.cumsum(counts) - counts)[shard_of_block] + within * self.block
        self._block_count = np.minimum(self.block, counts[shard_of_block] - within * self.block)
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._window = lru_cache(4 * lanes + 8)(self._permuted_window)

    def epoch_of(self, lane: int, ordinal: int) -> int:
        return (ordinal * self.lanes + lane) // self.num_samples

    def first_ordinal(self, lane: int, epoch: int) -> int:
        """Draws of a lane before an epoch."""
        return -((lane - epoch * self.num_samples) // self.lanes)

    def length(self, lane: int, epoch: int) -> int:
        """Draws of a lane in an epoch; those of two lanes differ by one at most."""
        return self.first_ordinal(lane, epoch + 1) - self.first_ordinal(lane, epoch)

    def draw(self, lane: int, ordinal: int) -> tuple[int, int]:
        """(epoch, number of the sample)."""
        import numpy as np

        epoch = self.epoch_of(lane, ordinal)
        window, within = divmod(ordinal - self.first_ordinal(lane, epoch), self.window)
        position = self._begin(lane, epoch) + window * self.window + int(self._window(epoch, lane, window)[within])
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, position, side="right"))
        block = order[place]
        return epoch, int(self._block_first[block] + self._block_count[block] - (ends[place] - position))

    def block_of(self, number: int, first: int) -> tuple[int, int]:
        """Numbers [begin, end) of the samples of one block, end not yet cut at the shard's end; `first`: the shard's first sample."""
        begin = first + (number - first) // self.block * self.block
        return begin, begin + self.block

    def blocks_of_window(self, lane: int, ordinal: int) -> list[int]:
        """The first sample of each block that the window of this ordinal draws from."""
        import numpy as np

        epoch = self.epoch_of(lane, ordinal)
        begin = self._begin(lane, epoch)
        start = begin + (ordinal - self.first_ordinal(lane, epoch)) // self.window * self.window
        end = min(start + self.window, begin + self.length(lane, epoch))
        order, ends = self._epoch(epoch)
        places = np.arange(np.searchsorted(ends, start, side="right"), np.searchsorted(ends, end - 1, side="right") + 1)
        return self._block_first[order[places]].tolist()

    def begins_window(self, lane: int, ordinal: int) -> bool:
        """Whether a draw is the first of its window."""
        return (ordinal - self.first_ordinal(lane, self.epoch_of(lane, ordinal))) % self.window == 0

    def _begin(self, lane: int, epoch: int) -> int:
        """Where the lane's run begins in the epoch's order: the draws of the lanes before it."""

        def before(place: int) -> int:
            rounds, rest = divmod(place, self.lanes)
            return rounds * lane + min(rest, lane)

        return before((epoch + 1) * self.num_samples) - before(epoch * self.num_samples)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted blocks, and where each ends in the epoch's order."""
        import numpy as np

        if epoch not in self._epochs:
            order = random_generator(f"{self.key}/blocks/{epoch}").permutation(len(self._block_first))
            self._epochs[epoch] = order, np.cumsum(self._block_count[order])
            while len(self._epochs) > 3:  # where lanes are in different ones
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]

    def _permuted_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        size = min(self.window, self.length(lane, epoch) - window * self.window)
        return random_generator(f"{self.key}/window/{epoch}/{lane}/{window}").permutation(size)


def random_generator(key: str) -> np.random.Generator:
    """NumPy's counter-based generator (Philox 4x64, Salmon et al. 2011), keyed by a text."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")))


@dataclass
class Lane:
    """One row of the global batch: what it drew so far, and of a mixture which data set comes next.

    Args:
        weights: of each order; shares of the draws.
        epochs: draws end after so many passes (of one data set only); None: they never do.
        announce: told of each window that begins, as (lane, data set, ordinal).
    """

    number: int
    orders: list[Order]
    weights: list[float]
    seed: int
    epochs: float | None = None
    announce: Callable[[int, int, int], None] | None = None
    counts: list[int] = field(default_factory=list)
    """Draws so far, of each data set."""

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * len(self.orders)
        self._begun: set[int] = set()
        self._shares = [weight / sum(self.weights) for weight in self.weights]
        # where in its round each data set stands at the start: another place in each lane, or all would draw from one at a time
        self._phases = random_generator(f"{self.seed}/phases/{self.number}").random(len(self.orders)).tolist()

    def draw(self) -> Draw | None:
        """The next sample; None: this lane has had all of its epochs."""
        dataset = self._next_dataset()
        ordinal, order = self.counts[dataset], self.orders[dataset]
        if self.epochs is not None and ordinal * order.lanes + self.number >= self.epochs * order.num_samples:
            return None
        if self.announce is not None and (dataset not in self._begun or self.orders[dataset].begins_window(self.number, ordinal)):
            self._begun.add(dataset)
            self.announce(self.number, dataset, ordinal)
        self.counts[dataset] += 1
        return Draw(dataset, ordinal, *self.orders[dataset].draw(self.number, ordinal))

    def again(self, dataset: int, ordinal: int) -> Draw:
        """A sample drawn before."""
        return Draw(dataset, ordinal, *self.orders[dataset].draw(self.number, ordinal))

    def _next_dataset(self) -> int:
        """The data set that is furthest behind its share: after t draws each is within one of t x share."""
        if len(self.orders) == 1:
            return 0
        t = sum(self.counts) + 1
        behind = [share * t - count + phase for share, count, phase in zip(self._shares, self.counts, self._phases, strict=True)]
        return max(range(len(behind)), key=behind.__getitem__)
