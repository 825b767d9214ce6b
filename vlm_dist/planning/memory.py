"""From what was counted to the memory of one rank and the time of a step."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from vlm_dist.config import Config
from vlm_dist.deepspeed_config import loads_sharded
from vlm_dist.planning.count import Counted
from vlm_dist.planning.gpus import Gpu

CONTEXT = 600_000_000
"""Bytes that CUDA, cuBLAS and NCCL take for themselves. Assumed."""
FRAGMENTED = 0.04
"""Share of what comes and goes that the allocator cannot use. Assumed."""
SMALL_IN_8_BIT = 4096  # bitsandbytes keeps the moments of smaller tensors in float32
BLOCK_IN_8_BIT = 256
NEAR, FAR = 0.9, 0.35
"""Shares of each operation's own limit that a good and a poor run reach. Assumed."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by part."""

    parts: dict[str, int]
    host: int
    """Bytes that are offloaded to the host's memory, or its disk."""
    loading: int = 0
    """Bytes of the card at the fullest moment before training, while the weights are loaded."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory_of(counted: Counted, config: Config, stage: int, world_size: int, *, on_gpu: bool = True) -> Memory:
    """The memory of a rank while it trains, at its fullest moment.

    ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054) as DeepSpeed 0.19 does it: from stage 1 on, each rank has a float32 copy of its
    share of the trainable weights and the moments of that share; from 2 on, the gradients of that share; at 3 its share of all weights.
    """
    share = 1 if stage == 0 else 1 / world_size
    trainable = 4 * sum(counted.trainable)
    weights = {name: counted.weights[name] for name in ("4-bit", "statistics", "16-bit", "trainable")}
    moments = math.ceil(optimizer_bytes(counted.trainable, config.optim.name) * share)
    copies = math.ceil(trainable * share) if stage else 0
    beside = max(0, counted.peak - counted.saved)  # where few gradients exist at the fullest moment, few are counted
    gradients = math.ceil(min(trainable, beside) * (share if stage >= 2 else 1))
    working = beside - min(trainable, beside)
    host = 0
    if stage == 3:
        weights = {name: math.ceil(size * share) if name != "statistics" else size for name, size in weights.items()}
        weights["one layer whole"] = counted.largest_layer
    if config.engine.offload != "none":
        host, moments, copies = moments + copies, 0, 0
    if config.engine.offload == "all":
        moved = ("4-bit", "16-bit", "trainable")
        host += sum(weights[name] for name in moved)
        weights |= dict.fromkeys(moved, 0)
    parts = {
        "base in 4 bit": weights["4-bit"],
        "its scales": weights["statistics"],
        "base in 16 bit" if config.model.dtype != "float32" else "base in 32 bit": weights["16-bit"],
        "trainable weights": weights["trainable"],
        "one layer whole": weights.get("one layer whole", 0),
        "float32 copies": copies,
        "optimizer": moments,
        "gradients": gradients,
        "activations, vision": counted.saved_vision,
        "activations, language": counted.saved - counted.saved_vision,
        "working memory": working,
    }
    if on_gpu:
        parts["fragmentation"] = math.ceil(FRAGMENTED * (counted.saved + working + gradients))
        parts["CUDA itself"] = CONTEXT
    loading = loading_of(counted, config, world_size) + (CONTEXT if on_gpu else 0)
    return Memory({name: size for name, size in parts.items() if size}, host, loading)


def loading_of(counted: Counted, config: Config, world_size: int) -> int:
    """Bytes of weights on the card while they are loaded: the rank's share of each that has been, and one whole; at a stage or in a form
    that is not loaded in shares, all of them."""
    weights = Counter(counted.weights)
    if loads_sharded(config, world_size):
        kept = weights.pop("statistics", 0)
        shares = 0 if config.engine.offload == "all" else math.ceil(sum(weights.values()) / world_size)
        return kept + shares + counted.largest_loaded
    return sum(weights.values()) + counted.largest_loaded


def optimizer_bytes(trainable: list[int], optimizer: str) -> int:
    """Two moments of each trainable tensor: float32, or a byte each with a float32 scale for 256 (Dettmers et al. 2021,
    arXiv:2110.02861)."""
    if optimizer == "adamw":
        return 8 * sum(trainable)
    return sum(8 * n if n < SMALL_IN_8_BIT else 2 * n + 8 * -(-n // BLOCK_IN_8_BIT) for n in trainable)


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step on one rank."""

    limit: float
    """Every product at the card's full speed, all else for nothing."""
    fast: float
    slow: float
    """Each operation at 90 % and at 35 % of what it is bound by, and the gradients sent; nothing overlaps."""


def time_of(counted: Counted, gpu: Gpu, rounds: int, world_size: int) -> Time:
    """The time of a step of so many micro-batches."""
    roofline = rounds * counted.seconds(gpu.flops, gpu.bandwidth)
    update = 7 * counted.gradients / gpu.bandwidth  # AdamW reads weight, gradient and moments, and writes three of them
    sent = 2 * (world_size - 1) / world_size * counted.gradients / gpu.link
    return Time(rounds * counted.flops / gpu.flops, (roofline + update) / NEAR + sent, (roofline + update) / FAR + 2 * sent)
