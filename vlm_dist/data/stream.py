"""Shards -> the micro-batches of each optimizer step.

The seam: the trainer knows `next_step()`, `state_after()` and `restore()` and nothing of how samples are ordered. Here the order is
that of webdataset: shards permuted anew each epoch, samples shuffled within a window. Sample n of that order belongs to step
n // global_batch, slot n % global_batch; rank r takes the r-th run of slots. So what a step holds depends on the data, the seed and
the global batch alone. An unusable sample leaves its slot empty and moves nothing else.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vlm_dist.config import DataConfig
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import IGNORED, Encoded, Encoder
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.samples import BadSample, Sample, parse_sample
from vlm_dist.data.shards import count_samples, find_shards, read_in_order, read_shuffled
from vlm_dist.errors import DataError


@dataclass
class Counts:
    """What a step holds, on one rank or summed over all."""

    samples: int = 0
    tokens: int = 0
    """Real tokens: padding and blank rows are not counted."""
    slots: int = 0
    """Tokens computed, padding included."""
    labels: int = 0
    """Supervised tokens, as counted after the shift by one."""


@dataclass
class Step:
    """One rank's part of one optimizer step."""

    micro_batches: list[dict[str, Any]]
    counts: Counts
    keys: list[list[str]]
    """The samples of each micro-batch."""


@dataclass
class Stream:
    """The training samples of one rank, step by step, prepared ahead in a background thread."""

    shards: list[str]
    num_samples: int
    config: DataConfig
    encoder: Encoder
    quarantine: Quarantine
    seed: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    _step: int = 0
    _ready: queue.Queue | None = None
    _thread: threading.Thread | None = None
    _stopped: threading.Event = field(default_factory=threading.Event)

    def next_step(self) -> Step:
        """The micro-batches of the next optimizer step; always global_batch / (micro_batch x ranks) of them."""
        if self._ready is None:
            self._ready = queue.Queue(maxsize=self.config.prefetch)
            self._thread = threading.Thread(target=self._produce, args=(self._ready, self._step), name="stream", daemon=True)
            self._thread.start()
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        self._step += 1
        return item

    def state_after(self, steps: int) -> dict[str, Any]:
        """What `restore` needs to continue after so many optimizer steps."""
        return {"step": steps, "samples": steps * self.global_batch, "num_samples": self.num_samples}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state_after` says. Call before the first `next_step`."""
        if state["num_samples"] != self.num_samples:
            raise DataError(
                f"data.train: held {state['num_samples']} samples when the run began, now {self.num_samples}; restore the shards"
            )
        self._step = state["step"]

    def close(self) -> None:
        """Stop the background thread, and wait for it: Python must not end while it is inside a library."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=60)

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Every step from `start` on, without end."""
        per_rank = self.global_batch // self.world_size
        samples = self._samples(start * self.global_batch)
        with ThreadPoolExecutor(max(1, self.config.workers), "decode") as pool:
            decode = pool.map if self.config.workers else map
            while True:
                slots = [next(samples) for _ in range(self.global_batch)]
                mine = slots[self.rank * per_rank : (self.rank + 1) * per_rank]
                parsed = decode(self._try_parse, mine)
                yield self._collate([self._encode(raw, sample) for raw, sample in zip(mine, parsed, strict=True)])

    def _produce(self, ready: queue.Queue, start: int) -> None:
        try:
            for step in self.steps(start):
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

    def _samples(self, skip: int) -> Iterator[dict[str, Any]]:
        """Raw samples in the order of training, from number `skip` on."""
        epoch, offset = divmod(skip, self.num_samples)
        while True:
            for number, raw in enumerate(read_shuffled(self.shards, self.seed, epoch, self.config.shuffle_window)):
                if number >= offset:
                    yield {**raw, "__epoch__": epoch}
            epoch, offset = epoch + 1, 0

    def _try_parse(self, raw: dict[str, Any]) -> Sample | BadSample:
        try:
            return self.parse(raw)
        except BadSample as reason:
            return reason

    def _encode(self, raw: dict[str, Any], sample: Sample | BadSample) -> Encoded | None:
        """In one thread: a tokenizer takes no second call."""
        try:
            if isinstance(sample, BadSample):
                raise sample
            encoded = self.encoder.encode(sample)
        except BadSample as reason:
            self.quarantine.add(raw, str(reason))
            return None
        self.quarantine.count_good()
        return encoded

    def parse(self, raw: dict[str, Any]) -> Sample:
        """A raw sample in the common form; of several captions, each epoch draws one."""
        return parse_sample(
            raw,
            max_image_pixels=self.config.max_image_pixels,
            caption_prompt=self.config.caption_prompt,
            draw=f"{self.seed}/{raw['__epoch__']}",
        )

    def _collate(self, encoded: list[Encoded | None]) -> Step:
        batches, counts, keys = [], Counts(), []
        for start in range(0, len(encoded), self.micro_batch):
            rows = [sample for sample in encoded[start : start + self.micro_batch] if sample is not None]
            keys.append([row.key for row in rows])
            counts.samples += len(rows)
            counts.tokens += sum(row.length for row in rows)
            counts.labels += sum(int((row.labels[:, 1:] != IGNORED).sum()) for row in rows)
            if not any("pixel_values" in row.inputs for row in rows):
                rows.append(self._blank)
            batches.append(collate(rows, self.encoder.processor.tokenizer.pad_token_id))
            counts.slots += batches[-1]["input_ids"].numel()
        return Step(batches, counts, keys)

    @property
    def _blank(self) -> Encoded:
        """A row with a blank picture and no label. It joins a micro-batch that has no picture, so that every rank runs the vision
        tower in every micro-batch: else ZeRO's collectives would differ between ranks (DeepSpeed#7170)."""
        from PIL import Image

        message = {"role": "user", "content": [{"type": "image"}]}
        return self.encoder.encode_prompt([message], [Image.new("RGB", (56, 56))])


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
) -> Stream:
    """Find and check the shards of `data.train`.

    Raises:
        DataError: no shard, a damaged shard, or no sample in any.
    """
    shards = find_shards(config.train, "data.train")
    num_samples = sum(count_samples(shard, "data.train") for shard in shards)
    if num_samples == 0:
        raise DataError(f"data.train: the {len(shards)} shards hold no sample; make them again, e.g. with `vlm-dist data synth`")
    encoder = Encoder(processor, config.max_seq_length, config.on_too_long)
    return Stream(shards, num_samples, config, encoder, quarantine, seed, global_batch, micro_batch, rank, world_size)


def read_heldout(config: DataConfig, limit: int | None, quarantine: Quarantine) -> list[Sample]:
    """Held-out samples, spread evenly over all shards when there are more than `limit`."""
    if not config.heldout:
        return []
    shards = find_shards(config.heldout, "data.heldout")
    total = sum(count_samples(shard, "data.heldout") for shard in shards)
    wanted = set(range(total)) if limit is None or total <= limit else {number * total // limit for number in range(limit)}
    samples = []
    for number, raw in enumerate(read_in_order(shards)):
        if number in wanted:
            try:
                samples.append(parse_sample(raw, max_image_pixels=config.max_image_pixels, caption_prompt=config.caption_prompt))
            except BadSample as reason:
                quarantine.add(raw, str(reason))
    return samples
