"""From a configuration to the things that the loop turns: plan, model with its trainable weights, held-out samples."""

from __future__ import annotations

import logging
import math
import os
import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.config import Config
from vlm_dist.data.dataset import Dataset, open_datasets, open_heldout, open_storage
from vlm_dist.data.index import open_index
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.samples import BadSample, parse_sample
from vlm_dist.data.shards import find_paths, read_in_order
from vlm_dist.data.stream import Stream
from vlm_dist.distributed import Ranks
from vlm_dist.errors import DataError
from vlm_dist.families import Family
from vlm_dist.run_dir import RunDir, write_json

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "webdataset", "triton", "ray", "wandb", "numpy", "pillow")


@dataclass
class Loaded:
    """A model ready to train."""

    model: Any
    processor: Any
    family: Family
    dtype: torch.dtype
    fingerprint: str
    kernels: str
    """What was put into the model, in words."""
    rehearsal: str = ""
    """What its fullest micro-batch took, in words; nothing where it was not tried."""


def count_steps(config: Config, stream: Stream, ranks: Ranks) -> int:
    """Optimizer steps of the whole run; with packing and training.epochs all samples are measured to tell."""
    if config.training.steps is not None:
        return config.training.steps
    told = 0

    def note(share: float) -> None:
        nonlocal told
        if ranks.is_first and share >= (told + 1) / 10:
            told = int(10 * share)
            print(f"data: {share:.0%} of the samples measured", flush=True)

    if config.data.packing and ranks.is_first:
        print(f"data: measuring every sample, to tell how many steps {config.training.epochs:g} epochs take", flush=True)
    return max(ranks.gather(stream.count_steps(note)))


def row_rules(config: Config, loaded: Loaded, ranks: Ranks) -> dict[str, Any]:
    """How the stream fills rows for this architecture, as arguments of `open_stream`."""
    from vlm_dist.models.positions import position_rule

    pack = config.data.packing and loaded.family.packs
    if config.data.packing and not pack and ranks.is_first:
        logger.warning(
            "data.packing: rows of %s cannot hold several samples without one seeing another; samples of similar length are grouped "
            "instead",
            loaded.family.model_type,
        )
    return {"epochs": config.training.epochs, "pack": pack, "positions": position_rule(loaded.model) if pack else None}


def _steps_ahead(config: Config, num_samples: int) -> int | None:
    """The same before anything is loaded; None: not known before every sample is measured."""
    if config.training.steps is not None:
        return config.training.steps
    assert config.training.epochs is not None
    if config.data.packing:
        return None
    return math.ceil(config.training.epochs * num_samples / config.training.global_batch)


def model_source(config: Config, run: RunDir, ranks: Ranks) -> str:
    """Where to load the model from; a new model (model.scratch, model.mini_vlm) is made first, once, in the run directory."""
    if config.model.name is not None:
        return config.model.name
    if ranks.is_first and not (run.initial_model / "config.json").exists():
        from vlm_dist.models.save import fresh_folder, put_in_place

        temporary = fresh_folder(run.initial_model)
        if config.model.mini_vlm is not None:
            from vlm_dist.models.mini_vlm import compose

            compose(config.model.mini_vlm.vision, config.model.mini_vlm.language, temporary, seed=config.seed)
        elif config.model.scratch is not None:
            from vlm_dist.models.scratch import build_checkpoint

            build_checkpoint(config.model.scratch, training_texts(config), config.seed, temporary)
        put_in_place(temporary, run.initial_model)
    ranks.barrier()
    return str(run.initial_model)


def training_texts(config: Config, limit: int = 20_000) -> list[str]:
    """Texts for a new tokenizer, from the shards of data.train and whatever model.scratch.texts adds."""
    assert config.model.scratch is not None
    storage = open_storage(config.data)
    patterns = [*config.data.train_shards, *config.model.scratch.texts]
    shards = find_paths(patterns, "data.train", storage, allow_commands=config.data.allow_commands)
    open_index(shards, "data.train", storage)  # refuses what is no whole shard
    texts: list[str] = []
    for raw in read_in_order(shards, storage):
        try:
            sample = parse_sample(raw, max_image_pixels=config.data.max_image_pixels, caption_prompt=config.data.caption_prompt)
        except BadSample:
            continue  # named in the quarantine when it is trained on
        texts += [part["text"] for message in sample.messages for part in message["content"] if part["type"] == "text"]
        if len(texts) >= limit:
            break
    if not texts:
        raise DataError("data.train: no readable text to train a tokenizer on")
    return texts


def load_trainable(config: Config, run: RunDir, ranks: Ranks) -> Loaded:
    """Load the base, and choose what trains: adapters (lora) or the weights themselves (lora: null)."""
    import torch

    from vlm_dist.models.checkpointing import checkpoint_gradients
    from vlm_dist.models.load import choose_dtype, load_model
    from vlm_dist.models.lora import add_lora, freeze_sides
    from vlm_dist.models.patching import patch_model
    from vlm_dist.models.source import fingerprint

    torch.manual_seed(config.seed)
    source = model_source(config, run, ranks)
    model, processor, family = load_model(config.model, source, ranks.device, lora=config.lora)
    torch.manual_seed(config.seed)  # adapters start alike whatever loading drew
    if config.lora is not None:
        model = add_lora(model, family, config.lora)
    else:
        freeze_sides(model, family, config.model.freeze)
    checkpoint_gradients(model, family, config.model.gradient_checkpointing)
    dtype = choose_dtype(config.model.dtype, ranks.device)
    patches = patch_model(model, config.kernels)
    return Loaded(model, processor, family, dtype, fingerprint(source, config.model.revision), str(patches))


def dry_run(config: Config, world_size: int) -> dict[str, Any]:
    """Check the configuration, the shards, a sample of each, and the plan, without loading weights."""
    from vlm_dist.models.source import check_source
    from vlm_dist.training.engine import check_batches, deepspeed_config, zero_stage
    from vlm_dist.training.evaluate import check_metrics

    if config.model.name is not None:
        check_source(config.model.name)
    rounds = check_batches(config, world_size)
    check_metrics(config)
    deepspeed_config(config, world_size, "float32")
    datasets = open_datasets(config.data)
    num_samples = sum(len(one.index) for one in datasets)
    heldout = open_heldout(config.data)
    for one in datasets:
        _check_first_sample(config, one)
    steps = _steps_ahead(config, num_samples)
    return {
        "run": str(Path(config.output_dir) / config.name),
        "model": config.model.name or ("a new MiniVLM" if config.model.mini_vlm else "from scratch"),
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


def describe_environment(ranks: Ranks) -> dict[str, Any]:
    """Versions, hardware and command line, with anything that looks like a secret left out."""
    import torch

    return {
        "command": [redact(argument) for argument in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "ranks": ranks.world_size,
        "device": str(ranks.device),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cpus": os.cpu_count(),
    }


def write_environment(run: RunDir, ranks: Ranks) -> None:
    if ranks.is_first:
        write_json(run.environment, describe_environment(ranks))


def redact(argument: str) -> str:
    """`some_token=abc` -> `some_token=...`"""
    return re.sub(r"(?i)((?:key|token|secret|password)[^=]*=).+", r"\1...", argument)


def open_quarantine(config: Config, run: RunDir) -> Quarantine:
    return Quarantine(run.quarantine, config.data.max_bad_fraction)


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


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
