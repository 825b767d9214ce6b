"""The data of a configuration, sample by sample, as its model would be fed with it."""

from __future__ import annotations

from vlm_dist.config import Config
from vlm_dist.data.dataset import open_storage
from vlm_dist.data.shards import find_paths
from vlm_dist.data.verify import Findings, verify
from vlm_dist.inputs.opened import inputs_apart


def verify_config(config: Config, heldout: list[str], processes: int | None = None) -> Findings:
    """`verify` of `data.train` and `data.heldout`, with the configuration's processor.

    Args:
        heldout: shards instead of `data.heldout`, if any.

    Raises:
        DataError: no such shards.
        ModelError: the processor cannot be loaded.
    """
    data, storage = config.data, open_storage(config.data)
    train = find_paths(data.train_shards, "data.train", storage, allow_commands=data.allow_commands)
    apart = find_paths(heldout or data.heldout, "data.heldout", storage, allow_commands=data.allow_commands)
    with inputs_apart(config) as inputs:
        return verify(train, apart, data, processes=processes, encoder=inputs.stream_encoder)
