"""From a drawn sample to tensors: read, measure, decode, encode. What the threads of a stream do."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vlm_dist.config import DataConfig
from vlm_dist.data.dataset import Dataset
from vlm_dist.data.encode import Encoded, Encoder
from vlm_dist.data.lanes import Draw, Order
from vlm_dist.data.lengths import Ruler
from vlm_dist.data.rows import Slot
from vlm_dist.data.samples import Sample, outline, parse_sample
from vlm_dist.errors import BadSample


class Preparer:
    """Safe to use from several threads: each has a processor of its own, because a tokenizer takes no second call."""

    def __init__(self, datasets: list[Dataset], config: DataConfig, encoder: Encoder, seed: int, lanes: int):
        self.datasets, self.config, self.seed, self.lanes = datasets, config, seed, lanes
        self.orders = [
            Order(one.index.counts, lanes, seed, config.shuffle_window, one.name if len(datasets) > 1 else "") for one in datasets
        ]
        self._encoder, self._own = encoder, threading.local()
        self._unused, self._copying = copy.deepcopy(encoder), threading.Lock()  # nobody writes into it while it is copied

    @property
    def encoder(self) -> Encoder:
        """This thread's."""
        if not hasattr(self._own, "encoder"):
            with self._copying:
                self._own.encoder = copy.deepcopy(self._unused)
        return self._own.encoder

    @property
    def ruler(self) -> Ruler:
        """This thread's."""
        if not hasattr(self._own, "ruler"):
            self._own.ruler = Ruler(self.encoder)
        return self._own.ruler

    def read(self, draw: Draw) -> dict[str, Any]:
        """The files of a sample; of several captions, each epoch draws one.

        Raises:
            BadSample: two files have one name.
            DataError: its shard cannot be read.
        """
        raw = self.datasets[draw.dataset].raw(draw.number, self.orders[draw.dataset])
        return {**raw, "__draw__": f"{self.seed}/{draw.epoch}"}

    def announce(self, lane: int, dataset: int, ordinal: int) -> None:
        """A lane begins a window of a data set: fetch what it will read, and behind it what the next window will."""
        if self.datasets[dataset].is_remote:
            order = self.orders[dataset]
            for begin in (ordinal, ordinal + order.window):
                for number in order.blocks_of_window(lane, begin):
                    self.datasets[dataset].prefetch(number, order)

    def measure(self, draw: Draw) -> Slot:
        """Read a sample and find its length."""
        slot = Slot(draw)
        try:
            slot.raw = self.read(draw)
            found = outline(slot.raw, draw=slot.raw["__draw__"], **self._options)
            messages = self.encoder.placing.written(found.messages, found.objects, found.sizes)
            length = self.ruler.measure(messages, found.sizes, found.tools, found.videos)
            if length.tokens > self.config.max_seq_length:
                self.encoder.check_length(length.tokens)
                length = length._replace(tokens=self.config.max_seq_length)
            slot.length = length
        except BadSample as reason:
            slot.problem = reason
        return slot

    def encode(self, slot: Slot) -> tuple[Slot, Encoded | None]:
        """A sample's tensors; None, and the slot says why, where it cannot be used."""
        try:
            slot.raw = slot.raw or self.read(slot.draw)
            encoded = self.encoder.encode(self.parse(slot.raw))
        except BadSample as reason:
            slot.problem = reason
            return slot, None
        self.hear(slot, encoded, ())
        if len(self.datasets) > 1:
            ids = encoded.inputs["input_ids"]
            encoded.inputs["datasets"] = ids.new_full(ids.shape, slot.draw.dataset)
        return slot, encoded

    def hear(self, slot: Slot, encoded: Encoded | None, prompts: Iterable[str | None]) -> None:
        """What a sample had that is told at the end, also where it was encoded in another process."""
        if encoded is not None and slot.draw.epoch == 0:
            self._encoder.tally.add(encoded.notes)
        if prompts:
            self._encoder.prompts.restore(list(prompts))  # type: ignore[attr-defined]

    def parse(self, raw: dict[str, Any]) -> Sample:
        return parse_sample(raw, draw=raw["__draw__"], as_pixels=self.encoder.takes_pixels, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"max_image_pixels": self.config.max_image_pixels, "caption_prompt": self.config.caption_prompt}


class Workers:
    """Begins calls in threads, or does them at once where there are none. Use it as a context."""

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, "encode") if threads else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def begin(self, call: Callable, *arguments: Any) -> Future:
        if self._pool is not None:
            return self._pool.submit(call, *arguments)
        future: Future = Future()
        future.set_result(call(*arguments))
        return future
