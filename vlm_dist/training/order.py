"""Which sample each optimizer step holds, on each rank: read from the stream that trains, with the processor and without the model."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_dist.data.stream import open_stream
from vlm_dist.distributed import Ranks
from vlm_dist.models.load import read_model_config
from vlm_dist.models.processor import load_processor
from vlm_dist.run_dir import RunDir
from vlm_dist.training.engine import check_batches
from vlm_dist.training.prepare import model_source, open_quarantine

if TYPE_CHECKING:
    from vlm_dist.config import Config


def order_of(config: Config, *, world_size: int, steps: int, start: int = 0) -> list[list[list[str]]]:
    """Keys of the samples: [step][rank][place in the rank's micro-batches], `steps` of them from step `start` on.

    Unusable samples hold their place in training and are left out here. Nothing is written to the run directory.

    Raises:
        ConfigError: the batch cannot be cut for so many ranks.
        DataError: as `open_stream` does, or too many samples are unusable.
    """
    import torch

    check_batches(config, world_size)
    ranks = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        source = model_source(config, run, Ranks(0, 0, 1, torch.device("cpu")))
        processor = load_processor(config.model, source)
        _, family = read_model_config(config.model, source)
        for rank in range(world_size):
            stream = open_stream(
                config.data,
                processor,
                open_quarantine(config, run),
                seed=config.seed,
                global_batch=config.training.global_batch,
                micro_batch=config.training.micro_batch,
                rank=rank,
                world_size=world_size,
                epochs=config.training.epochs,
                pack=family.packs and config.data.packing,
            )
            ranks.append([[key for keys in step.keys for key in keys] for step in islice(stream.steps(skip=start), steps)])
    return [list(step) for step in zip(*ranks, strict=True)]
