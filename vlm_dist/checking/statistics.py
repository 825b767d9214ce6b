"""BatchNorm that would train: known from configurations alone."""

from __future__ import annotations

from typing import Any

from vlm_dist.config import Config
from vlm_dist.families import Family


def moving_statistics(config: Config, hf_config: Any, family: Family) -> str:
    """What a user should know of a model's BatchNorm layers that train; empty where there are none.

    Args:
        hf_config: the checkpoint's own configuration.
    """
    import torch

    from vlm_dist.models.modes import batch_norms, batch_norms_in_words
    from vlm_dist.planning.twin import skeleton

    with torch.device("meta"):
        model = skeleton(config, hf_config, family, torch.float32)
    return batch_norms_in_words(batch_norms(model, family), config.training.micro_batch)


def configured_model(config: Config) -> tuple[Any, Family] | None:
    """The configuration of the model that would train, and its family, before a new one is made; None for a model of random weights.

    Raises:
        ModelError: there is no such model, or a part of it cannot be used.
    """
    from vlm_dist.models.adapters import base_of, find_adapter
    from vlm_dist.models.compose import read_parts
    from vlm_dist.models.introspect import find_family
    from vlm_dist.models.load import read_model_config

    if config.model.mini_vlm is not None:
        joined = read_parts(config.model.mini_vlm.vision, config.model.mini_vlm.language).config()
        return joined, find_family(joined.model_type, joined)
    if config.model.name is None:
        return None
    adapter = find_adapter(config.model.name)
    return read_model_config(config.model, str(base_of(adapter).name) if adapter else config.model.name)
