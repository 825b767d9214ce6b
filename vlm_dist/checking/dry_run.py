"""`train --dry-run`: the configuration, the shards, a sample of each, and what would be trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vlm_dist.config import Config
from vlm_dist.data.dataset import Dataset, open_datasets, open_heldout
from vlm_dist.data.samples import parse_sample
from vlm_dist.deepspeed_config import check_batches, deepspeed_config, zero_stage
from vlm_dist.errors import BadSample, ConfigError, DataError
from vlm_dist.models.adapters import base_of, find_adapter
from vlm_dist.models.features import check_features
from vlm_dist.models.going_on import settle
from vlm_dist.models.load import read_model_config
from vlm_dist.models.shared_rows import check_sequence
from vlm_dist.models.source import check_source
from vlm_dist.scoring.evaluate import check_metrics


def dry_run(config: Config, world_size: int) -> dict[str, Any]:
    """Check the configuration, the shards, a sample of each, and the plan, without loading weights."""
    config = settle(config)
    adapter = find_adapter(config.model.name) if config.model.name is not None else None
    if config.model.name is not None and adapter is None:
        check_source(config.model.name)
    parts = _parts(config)
    rounds = check_batches(config, world_size)
    check_metrics(config)
    if (config.engine.sequence_parallel > 1 or config.data.cache_features) and config.model.name is not None:
        hf_config, family = read_model_config(config.model, str(base_of(adapter).name) if adapter else config.model.name)
        check_sequence(family, hf_config, config.engine.sequence_parallel)
        check_features(config, family, hf_config, world_size)
    deepspeed_config(config, world_size, "float32")
    datasets = open_datasets(config.data)
    num_samples = sum(len(one.index) for one in datasets)
    heldout = open_heldout(config.data)
    for one in datasets:
        _check_first_sample(config, one)
    steps = _steps_ahead(config, num_samples)
    return {
        "run": str(Path(config.output_dir) / config.name),
        "model": config.model.name or (f"a new mini VLM: {parts}" if parts else config.model.kind),
        "weights": "NF4 with double quantisation" if config.model.load_in_4bit else config.model.dtype,
        "training": f"LoRA r={config.lora.r}"
        if config.lora
        else "every weight" + (f" but {config.model.freeze}" if config.model.freeze else ""),
        "train_shards": sum(len(one.index.shards) for one in datasets),
        "train_samples": num_samples,
        "heldout_shards": len(heldout.index.shards) if heldout else 0,
        "heldout_samples": len(heldout.index) if heldout else 0,
        "steps": steps,
        "epochs": config.training.epochs
        if config.data.packing or steps is None
        else round(steps * config.training.global_batch / num_samples, 3),
        "global_batch": config.training.global_batch,
        "micro_batch": config.training.micro_batch,
        "accumulation_rounds": rounds,
        "ranks": world_size,
        "zero_stage": zero_stage(config, world_size),
    }


def _parts(config: Config) -> Any:
    """What a mini VLM is to be joined from, checked as far as files without weights tell; None: it is no mini VLM.

    Raises:
        ModelError: a part cannot be used.
        ConfigError: a picture alone is longer than a row.
    """
    if config.model.mini_vlm is None:
        return None
    from vlm_dist.models.compose import read_parts

    parts = read_parts(config.model.mini_vlm.vision, config.model.mini_vlm.language)
    if parts.image_tokens >= config.data.max_seq_length:
        raise ConfigError(
            f"data.max_seq_length={config.data.max_seq_length}: a picture alone is {parts.image_tokens} tokens; give at least "
            f"{parts.image_tokens + 32}"
        )
    return parts


def _steps_ahead(config: Config, num_samples: int) -> int | None:
    """Optimizer steps; None: not known before every sample is measured."""
    if config.training.steps is not None:
        return config.training.steps
    assert config.training.epochs is not None
    if config.data.packing:
        return None
    return math.ceil(config.training.epochs * num_samples / config.training.global_batch)


def _check_first_sample(config: Config, dataset: Dataset) -> None:
    """One readable sample must be among the first."""
    reason = ""
    for number in range(min(20, len(dataset.index))):
        raw = dataset.raw(number)
        try:
            parse_sample(raw, max_image_pixels=config.data.max_image_pixels, caption_prompt=config.data.caption_prompt)
            return
        except BadSample as problem:
            reason = f"{raw['__key__']}: {problem}"
    raise DataError(f"data.train: none of the first samples of '{dataset.index.shards[0]}' is usable; {reason}")
