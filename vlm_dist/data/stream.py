"""Shards -> the micro-batches of each optimizer step.

The seam: the trainer knows `next_step()`, `state()` and `restore()` and nothing of how samples are ordered. Which sample stands in
which row of which step is decided by lanes (lanes.py) and, with packing, by lengths inside a lane (rows.py), never by the number of
ranks or threads. An unusable sample leaves its place empty and moves nothing else.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vlm_dist.config import DataConfig
from vlm_dist.data.collate import Positions, collate, collate_packed, with_blank
from vlm_dist.data.dataset import Dataset, open_datasets
from vlm_dist.data.encode import Encoder
from vlm_dist.data.encoded import Encoded, count_labels, count_patches
from vlm_dist.data.lanes import Lane
from vlm_dist.data.preparer import Preparer, Workers
from vlm_dist.data.processes import Processes, workers_for
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.rows import MeasuredRows, PlainRows, Rows, Slot, until_done
from vlm_dist.errors import DataError

AHEAD = 2  # steps whose samples the threads are given before the first of them is asked for


@dataclass
class Counts:
    """What a step holds, on one rank or summed over all."""

    samples: int = 0
    tokens: int = 0
    """Real tokens: padding and blank rows are not counted."""
    slots: int = 0
    """Tokens computed, padding included."""
    labels: float = 0
    """Supervised tokens, as counted after the shift by one; each as much as its turn's weight."""
    patches: int = 0
    """What the vision tower computes, see `count_patches`."""


@dataclass
class Step:
    """One rank's part of one optimizer step."""

    micro_batches: list[dict[str, Any]]
    counts: Counts
    keys: list[list[str]]
    """The samples of each micro-batch, in the order in which they stand in its rows."""
    labels: list[float]
    """Supervised tokens of each data set; they sum up to `counts.labels`."""
    lanes: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Where this rank's lanes stand after the step."""


@dataclass
class Stream:
    """The training samples of one rank, step by step, prepared ahead in the background."""

    datasets: list[Dataset]
    config: DataConfig
    encoder: Encoder
    quarantine: Quarantine
    seed: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    epochs: float | None = None
    pack: bool = False
    """Several samples a row; data.packing with an architecture that can."""
    positions: Positions | None = None
    """With packing: a sample's position ids, where they are not simply 0, 1, 2, ..."""
    multiple: int = 1
    """The tokens of a row, padding included, are a multiple of it."""
    in_processes: bool = False
    """Samples are prepared in processes, not in threads."""
    finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Done with a micro-batch in the background."""
    _step: int = 0
    _state: dict[int, dict[str, Any]] = field(default_factory=dict)
    _ready: queue.Queue | None = None
    _thread: threading.Thread | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.preparer = Preparer(self.datasets, self.config, self.encoder, self.seed, self.global_batch)
        self.orders = self.preparer.orders
        per_rank = self.global_batch // self.world_size
        self._lanes = range(self.rank * per_rank, (self.rank + 1) * per_rank)

    @property
    def names(self) -> list[str]:
        """Of the data sets."""
        return [one.name for one in self.datasets]

    @property
    def num_samples(self) -> int:
        return sum(len(one.index) for one in self.datasets)

    @property
    def num_shards(self) -> int:
        return sum(len(one.index.shards) for one in self.datasets)

    def next_step(self) -> Step:
        """The micro-batches of the next optimizer step; always global_batch / (micro_batch x ranks) of them."""
        if self._ready is None:
            self._ready = queue.Queue(maxsize=self.config.prefetch)
            self._thread = threading.Thread(target=self._produce, args=(self._ready,), name="stream", daemon=True)
            self._thread.start()
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        self._step, self._state = self._step + 1, item.lanes
        return item

    def state(self) -> dict[str, Any]:
        """This rank's part of what `restore` needs to continue after the last step given; see `merge_states`."""
        return {"step": self._step, **self._fixed, "lanes": self._state}

    @property
    def _fixed(self) -> dict[str, Any]:
        """What must be the same at every start of a run."""
        digests = {one.name: one.index.digest for one in self.datasets}
        return {"global_batch": self.global_batch, "packing": self.config.packing, "digests": digests}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where the merged states of all ranks say, be it on another number of ranks. Call before the first `next_step`.

        Raises:
            DataError: the data, the global batch, or packing is not what it was.
        """
        now = self._fixed
        if state.get("digests") != now["digests"]:
            raise DataError(f"data.train: not the shards that the run began with ({self.num_samples:,} samples now); restore them")
        for key, name in (("global_batch", "training.global_batch"), ("packing", "data.packing")):
            if state[key] != now[key]:
                raise DataError(f"{name}: {now[key]} now, {state[key]} when the run began; set it back")
        self._step = state["step"]
        self._state = {lane: state["lanes"][str(lane)] for lane in self._lanes} if state["lanes"] else {}

    def count_steps(self, note: Callable[[float], object] = lambda share: None) -> int:
        """Optimizer steps until this rank's lanes have had all their epochs. With packing every sample is measured to tell, and `note` is
        told after each lane what share is done."""
        assert self.epochs is not None
        if not self.config.packing:
            return math.ceil(self.epochs * self.num_samples / self.global_batch)
        most = 0
        with Workers(self.config.workers) as workers:
            for done, rows in enumerate(self._rows(workers, lambda slot: None), start=1):
                for number, _ in enumerate(until_done(rows), start=1):
                    most = max(most, number)
                note(done / len(self._lanes))
        return most

    def close(self) -> None:
        """Stop the background thread, and wait for it: Python must not end while it is inside a library. Nothing more is fetched."""
        self._stopped.set()
        for one in self.datasets:
            one.storage.close()
        if self._thread is not None:
            self._thread.join(timeout=60)

    def steps(self, skip: int = 0) -> Iterator[Step]:
        """Every step from where `restore` left it, without end; the first `skip` of them are passed over."""
        coming: deque[tuple[list[list[Future]], dict[int, dict]]] = deque()
        with workers_for(self.config.workers, self.preparer, self.in_processes) as workers:
            lanes = self._rows(workers, self._discard)
            for lane in lanes:
                if lane.lane.number in self._state:
                    lane.restore(self._state[lane.lane.number])
                for _ in range(skip):
                    lane.next()
            while True:
                while len(coming) < AHEAD:
                    rows = [[workers.begin(self.preparer.encode, slot) for slot in lane.next()] for lane in lanes]
                    coming.append((rows, {lane.lane.number: lane.state() for lane in lanes}))
                rows, states = coming.popleft()
                yield self._collate([[self._counted(future.result()) for future in row] for row in rows], states)

    def preview(self) -> Iterator[list[tuple[Slot, Encoded | None]]]:
        """Row after row of training, lane by lane, each sample with its tensors, or with its problem."""
        lanes = self._rows(Workers(0), lambda slot: None)
        while True:
            for lane in lanes:
                yield [self.preparer.encode(slot) for slot in lane.next()]

    def measured(self) -> Iterator[Slot]:
        """Sample after sample of training with its length, or with its problem; no picture is decoded."""
        weights = [one.weight for one in self.datasets]
        lanes = [Lane(number, self.orders, weights, self.seed) for number in self._lanes]
        for lane in itertools.cycle(lanes):
            draw = lane.draw()
            assert draw is not None
            yield self.preparer.measure(draw)

    def _rows(self, workers: Workers | Processes, discard: Callable[[Slot], None]) -> list[Rows]:
        weights, announce = [one.weight for one in self.datasets], self.preparer.announce
        lanes = [Lane(number, self.orders, weights, self.seed, self.epochs, announce) for number in self._lanes]
        if not self.config.packing:
            return [PlainRows(lane) for lane in lanes]
        options = {"pack": self.pack, "limit": self.config.max_seq_length, "most_patches": self.config.max_patches}
        measure = partial(workers.begin, self.preparer.measure)
        return [MeasuredRows(lane, measure, discard, **options, lookahead=self.config.pack_lookahead) for lane in lanes]

    def _produce(self, ready: queue.Queue) -> None:
        try:
            for step in self.steps():
                if not self._hand_over(ready, step):
                    return
        except BaseException as error:  # the trainer raises it
            self._hand_over(ready, error)

    def _hand_over(self, ready: queue.Queue, item: Step | BaseException) -> bool:
        """Wait for a free place; False if the stream is closed meanwhile."""
        while not self._stopped.is_set():
            try:
                ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _counted(self, result: tuple[Slot, Encoded | None]) -> Encoded | None:
        slot, encoded = result
        if encoded is None:
            self._discard(slot)
        else:
            self.quarantine.count_good()
        return encoded

    def _discard(self, slot: Slot) -> None:
        place = self.datasets[slot.draw.dataset].index.place(slot.draw.number)
        raw = slot.raw or {"__url__": place.shard, "__key__": f"(at byte {place.start})"}
        self.quarantine.add(raw, str(slot.problem))

    def _collate(self, rows: list[list[Encoded | None]], lanes: dict[int, dict]) -> Step:
        import torch

        step, pad = Step([], Counts(), [], [0] * len(self.datasets), lanes), self.encoder.processor.tokenizer.pad_token_id
        counts = step.counts
        for start in range(0, len(rows), self.micro_batch):
            kept = [[sample for sample in row if sample is not None] for row in rows[start : start + self.micro_batch]]
            samples = list(itertools.chain(*kept))
            step.keys.append([sample.key for sample in samples])
            counts.samples += len(samples)
            counts.tokens += sum(sample.length for sample in samples)
            for sample in samples:
                number = int(sample.inputs["datasets"][0, 0]) if "datasets" in sample.inputs else 0
                step.labels[number] += count_labels(sample)
            counts.patches += sum(count_patches(sample.inputs) for sample in samples)
            kept = with_blank([row for row in kept if row], self.encoder.lacking(samples), self.pack, self.encoder.videos.is_on)
            alone, ways = list(itertools.chain(*kept)), {"multiple": self.multiple}
            batch = collate_packed(kept, pad, self.positions, **ways) if self.pack else collate(alone, pad, **ways)
            if len(self.datasets) > 1:
                batch["num_datasets"] = torch.tensor(len(self.datasets))
            step.micro_batches.append(self.finish(batch) if self.finish else batch)
            counts.slots += batch["input_ids"].numel()
        counts.labels = sum(step.labels)
        return step


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The `Stream.state()` of every rank -> what any number of ranks continues from. Lanes are named by their numbers, as text."""
    lanes = {str(number): lane for state in states for number, lane in state["lanes"].items()}
    return {**states[0], "lanes": lanes}


def open_stream(
    config: DataConfig,
    processor: Any,
    quarantine: Quarantine,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    epochs: float | None = None,
    pack: bool = False,
    positions: Positions | None = None,
) -> Stream:
    """Find and index the shards of `data.train`; see `Stream` for the arguments.

    Raises:
        DataError: no shard, a damaged shard, or no sample in any.
    """
    datasets = open_datasets(config)
    encoder = Encoder.of(processor, config)
    return Stream(datasets, config, encoder, quarantine, seed, global_batch, micro_batch, rank, world_size, epochs, pack, positions)
