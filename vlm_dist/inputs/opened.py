"""From a configuration to what a run is made from, before any weight is loaded; each thing is opened once and handed on."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm_dist import distributed
from vlm_dist.config import Config
from vlm_dist.config_load import refuse_without_secrets
from vlm_dist.data.collate import Positions
from vlm_dist.data.dataset import Dataset, open_datasets
from vlm_dist.data.encode import Encoder
from vlm_dist.data.quarantine import HOPELESS, Quarantine
from vlm_dist.data.quarantine_redacted import RedactedQuarantine
from vlm_dist.data.stream import Stream
from vlm_dist.distributed import Ranks
from vlm_dist.errors import DataError
from vlm_dist.families import Family
from vlm_dist.inputs.made import model_source
from vlm_dist.inputs.prompts import NotingEncoder, SystemPrompts
from vlm_dist.inputs.workload import Workload, measured
from vlm_dist.models.adapters import base_of, find_adapter, has_processor
from vlm_dist.models.files import check_files
from vlm_dist.models.going_on import settle
from vlm_dist.models.load import read_model_config
from vlm_dist.models.processor import load_processor
from vlm_dist.run_dir import RunDir


@dataclass
class Inputs:
    """The data sets, and what is measured of them, are opened when they are first asked for."""

    config: Config
    """Settled: see `going_on.settle`."""
    source: str
    """Where the model lies, of an adapter its base: a folder or a hub id."""
    hf_config: Any
    """The checkpoint's own configuration."""
    family: Family
    processor: Any
    quarantine: Quarantine
    adapter: Path | None = None
    """The adapter that training goes on from."""
    prompts: SystemPrompts = field(default_factory=SystemPrompts)
    """The system prompts of the samples that the streams have given."""

    @property
    def packs(self) -> bool:
        """Several samples a row: data.packing with an architecture that can."""
        return self.config.data.packing and self.family.packs

    @cached_property
    def datasets(self) -> list[Dataset]:
        """Those of `data.train`, indexed.

        Raises:
            DataError: no shard, a damaged shard, or no sample in any.
        """
        return open_datasets(self.config.data)

    @cached_property
    def encoder(self) -> Encoder:
        """Cuts nothing: for counting what samples take, not for training on them."""
        return Encoder(self.processor, max_seq_length=2**31, video=self.config.data.video)

    @cached_property
    def stream_encoder(self) -> NotingEncoder:
        """As samples are encoded to train on them."""
        encoder = NotingEncoder.of(self.processor, self.config.data)
        encoder.prompts = self.prompts
        return encoder

    @cached_property
    def workload(self) -> Workload:
        """The fullest row among the first samples.

        Raises:
            DataError: there are no shards, or none of the first samples can be used.
        """
        return measured(self.config, self.encoder, self.stream(), self.packs)

    def check_first_samples(self) -> None:
        """What is a fault of the set-up and not of a sample shows in every sample: told before the first step.

        Raises:
            DataError: none of the first samples can be used.
        """
        stream, problem = self.stream(), ""
        count = min(HOPELESS, stream.num_samples)
        for slot in itertools.islice(stream.measured(), count):
            if slot.problem is None:
                return
            problem = problem or f"{(slot.raw or {}).get('__key__', 'the first')}: {slot.problem}"
        raise DataError(f"data.train: none of the first {count} samples can be used; {problem}")

    def stream(
        self, rank: int = 0, world_size: int = 1, *, epochs: float | None = None, positions: Positions | None = None,
        finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None, in_processes: bool = False,
    ) -> Stream:  # fmt: skip
        """The training samples of one rank, or of the ranks that share its rows; see `Stream`."""
        config = self.config
        batch = {"global_batch": config.training.global_batch, "micro_batch": config.training.micro_batch}
        place = {"rank": rank, "world_size": world_size}
        rows = {"epochs": epochs, "pack": self.packs, "positions": positions, "finish": finish, "in_processes": in_processes}
        rows["multiple"] = config.engine.sequence_parallel
        return Stream(self.datasets, config.data, self.stream_encoder, self.quarantine, config.seed, **batch, **place, **rows)


def open_inputs(config: Config, run: RunDir, ranks: Ranks) -> Inputs:
    """Find the model (a new one is made first, in the run directory) and read its configuration and processor. Every rank must call it.

    Raises:
        ConfigError: an address lacks its secret: the configuration is what a run keeps.
        ModelError: no such checkpoint, or an architecture or processor that is not supported.
        DataError: a new model needs a tokenizer, and there is no text to train one on.
    """
    config = settle(config)
    refuse_without_secrets(config)
    adapter = find_adapter(config.model.name) if config.model.name is not None else None
    if adapter is not None:
        check_files(adapter)
    source = str(base_of(adapter).name) if adapter else model_source(config, run, ranks)

    def read() -> tuple[Any, Family, Any]:
        found = read_model_config(config.model, source)  # first: it says best what is wrong with a checkpoint
        return *found, load_processor(config.model, str(adapter) if adapter and has_processor(adapter) else source)

    hf_config, family, processor = ranks.first_on_node(read)
    quarantine = RedactedQuarantine(run.quarantine, config.data.max_bad_fraction)
    return Inputs(config, source, hf_config, family, processor, quarantine, adapter)


@contextmanager
def inputs_apart(config: Config) -> Iterator[Inputs]:
    """The same for one process that looks and does not train: nothing is written to the run directory."""
    with tempfile.TemporaryDirectory() as folder:
        yield open_inputs(config, RunDir(Path(folder)), distributed.alone())
