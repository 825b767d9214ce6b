"""Which sample each optimizer step holds, on each rank: read from the stream that trains, with the processor and without the model."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from vlm_dist.deepspeed_config import check_batches
from vlm_dist.inputs.opened import inputs_apart

if TYPE_CHECKING:
    from vlm_dist.config import Config


def order_of(config: Config, *, world_size: int, steps: int, start: int = 0) -> list[list[list[str]]]:
    """Keys of the samples: [step][rank][place in the rank's micro-batches], `steps` of them from step `start` on.

    Unusable samples hold their place in training and are left out here. Nothing is written to the run directory.

    Raises:
        ConfigError: the batch cannot be cut for so many ranks.
        DataError: as `open_stream` does, or too many samples are unusable.
    """
    check_batches(config, world_size)
    ranks = []
    with inputs_apart(config) as inputs:
        sharing = config.engine.sequence_parallel
        for rank in range(world_size):
            stream = inputs.stream(rank // sharing, world_size // sharing, epochs=config.training.epochs)
            ranks.append([[key for keys in step.keys for key in keys] for step in islice(stream.steps(skip=start), steps)])
    return [list(step) for step in zip(*ranks, strict=True)]
