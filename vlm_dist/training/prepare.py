"""From the inputs of a run to what the loop turns: the model with its trainable weights, and the stream that feeds it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.data.stream import Stream
from vlm_dist.deepspeed_config import deepspeed_config, loads_sharded
from vlm_dist.distributed import Ranks
from vlm_dist.families import Family
from vlm_dist.inputs.opened import Inputs
from vlm_dist.inputs.prompts import SystemPrompts
from vlm_dist.upstream.deepspeed import gathered, gathered_in_use

if TYPE_CHECKING:
    import torch

    from vlm_dist.models.features import TowerFeatures

logger = logging.getLogger(__name__)


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
    prompts: SystemPrompts
    """The system prompts of the samples, as they are trained on."""
    choices: tuple[str, ...] = ()
    """What was chosen where the configuration leaves it open, in words."""
    described: dict[str, Any] = field(default_factory=dict)
    """What a run that goes on must find again besides the base; see unchanged.py."""
    features: TowerFeatures | None = None
    """Of a frozen vision tower, where they are kept."""
    rehearsal: str = ""
    """What its fullest micro-batch took, in words; nothing where it was not tried."""


def load_trainable(inputs: Inputs, ranks: Ranks) -> Loaded:
    """Load the base, and choose what trains: adapters (lora), new ones or those to go on from, or the weights themselves (lora: null).

    Raises:
        ModelError: the weights cannot be loaded, or the adapter to go on from does not fit them.
    """
    import torch

    from vlm_dist.models.checkpointing import checkpoint_gradients
    from vlm_dist.models.experts import balance_weight
    from vlm_dist.models.experts_lora import experts_in_words
    from vlm_dist.models.features import keep_features
    from vlm_dist.models.files import check_files
    from vlm_dist.models.load import choose_dtype, load_weights
    from vlm_dist.models.lora import add_lora, freeze_sides
    from vlm_dist.models.modes import hold_frozen
    from vlm_dist.models.patching import patch_model
    from vlm_dist.models.patching_lengths import attend_by_lengths
    from vlm_dist.models.processor import check_vocabulary
    from vlm_dist.models.sequence import SequenceCut
    from vlm_dist.models.sharded import Sharding
    from vlm_dist.models.shared_pictures import share_rows
    from vlm_dist.models.source import fingerprint, weight_files

    config, family = inputs.config, inputs.family
    ranks.first_on_node(lambda: weight_files(inputs.source, config.model.revision))
    check_files(Path(inputs.source))  # of a run's model; a checkpoint of others has no record
    torch.manual_seed(config.seed)
    dtype = choose_dtype(config.model.dtype, ranks.device)
    zero = deepspeed_config(config, ranks.world_size, dtype, on_gpu=ranks.device.type == "cuda")
    sharding = Sharding.of(config, zero) if loads_sharded(config, ranks.world_size) else None
    model: Any = load_weights(config.model, inputs.source, family, ranks.device, lora=config.lora, sharding=sharding)
    check_vocabulary(inputs.processor, model, inputs.source)
    torch.manual_seed(config.seed)  # adapters start alike whatever loading drew
    if inputs.adapter is not None:
        model = _go_on(model, inputs)
    elif config.lora is not None:
        model = add_lora(model, family, config.lora)
    else:
        freeze_sides(model, family, config.model.freeze)
    checkpoint_gradients(model, family, config.model.gradient_checkpointing)
    hold_frozen(model)
    attention = attend_by_lengths(
        model, family, config.model.attn_implementation, packs=inputs.packs, on_gpu=ranks.device.type == "cuda", dtype=dtype
    )
    shared = ""
    if ranks.sharing > 1:
        cut = SequenceCut(ranks.sharing, ranks.rank % ranks.sharing, ranks.sharing_group())
        shared = share_rows(model, family, cut, cached=config.data.cache_features)
    with gathered_in_use(model):
        patches = patch_model(model, config.kernels, balances=bool(balance_weight(model, config)))
    of_base = fingerprint(inputs.source, config.model.revision)
    experts = experts_in_words(model, config.lora) if config.lora is not None else ""
    features = keep_features(model, family, config.data, dtype, ranks.world_size) if config.data.cache_features else None
    choices = tuple(filter(None, (experts, attention, shared, features and str(features))))
    return Loaded(model, inputs.processor, family, dtype, of_base, str(patches), inputs.prompts, choices, features=features)


def _go_on(model: Any, inputs: Inputs) -> Any:
    """The adapter of an earlier training on its base, with the dropout of this one; checked as for use."""
    from vlm_dist.models.adapters import put_on
    from vlm_dist.models.record import check_base, check_probe, check_processor, read_record
    from vlm_dist.models.trained import in_the_form_of

    config, folder = inputs.config.model, inputs.adapter
    assert folder is not None
    record = read_record(folder)
    if record is not None:
        check_base(record, inputs.source, config.revision)
        if not config.processor:
            check_processor(record, inputs.processor)
    assert inputs.config.lora is not None
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    with gathered(parameter for end in ends for parameter in end.parameters()):  # an adapter may bring its own
        model = put_on(model, folder, trainable=True, dropout=inputs.config.lora.dropout)
    if record is not None and in_the_form_of(record, config) and not config.processor:
        with gathered_in_use(model):
            check_probe(record, model, inputs.processor)
    elif record is not None and record["base"]["load_in_4bit"] != config.load_in_4bit:
        logger.warning(
            "model.load_in_4bit=%s: not so when '%s' was trained; it begins elsewhere than it ended", config.load_in_4bit, folder
        )
    return model


def open_training_stream(inputs: Inputs, model: Any, ranks: Ranks) -> Stream:
    """This rank's share of `data.train`, its rows filled as the architecture can take them.

    Raises:
        DataError: no shard, a damaged shard, or no sample in any.
    """
    from vlm_dist.models.load import choose_dtype
    from vlm_dist.models.positions import position_rule
    from vlm_dist.training.placing import made_ready

    config = inputs.config
    if config.data.packing and not inputs.packs and ranks.is_first:
        logger.warning(
            "data.packing: rows of %s cannot hold several samples without one seeing another; samples of similar length are grouped "
            "instead",
            inputs.family.model_type,
        )
    positions = position_rule(model) if inputs.packs else None
    finish = made_ready(model, ranks.device, choose_dtype(config.model.dtype, ranks.device))
    if not ranks.is_first_of_rows:
        inputs.quarantine.is_silent = True  # who shares its rows says it
    apart = ranks.device.type == "cuda" if config.data.processes == "auto" else config.data.processes
    ways: dict[str, Any] = {"positions": positions, "finish": finish, "in_processes": apart}
    return inputs.stream(ranks.replica, ranks.replicas, epochs=config.training.epochs, **ways)
