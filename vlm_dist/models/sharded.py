"""Loading at ZeRO stage 3: each weight is cut into the ranks' shares as soon as it is read, so that no rank ever holds more than its share
and one weight."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vlm_dist.config import Config, LoraConfig
from vlm_dist.families import Family
from vlm_dist.models.lora import trained_whole, trains_fully
from vlm_dist.upstream.deepspeed import sharder
from vlm_dist.upstream.transformers import weight_by_weight

MMAP_THRESHOLD = -3  # mallopt(3)


@dataclass(frozen=True)
class Sharding:
    """How the weights of a run are cut."""

    zero: dict[str, Any]
    """The DeepSpeed JSON that the engine will be started with."""
    lora: LoraConfig | None
    frozen: tuple[str, ...] = ()
    """Sides that do not train where lora is null."""

    @classmethod
    def of(cls, config: Config, zero: dict[str, Any]) -> Sharding:
        return cls(zero, config.lora, tuple(config.model.freeze))

    @contextmanager
    def while_loading(self, family: Family, prepare: Callable[[Any], object]) -> Iterator[None]:
        """Inside, `from_pretrained` keeps this rank's share of each weight; in float32 of those that will train. Modules that adapters
        train whole are copied by PEFT, and stay whole until the engine takes them. Every rank must load the same.

        Args:
            prepare: is called with a module that got a weight, before it is cut.
        """
        _give_back_what_is_freed()
        shard = sharder(self.zero)
        whole = set(trained_whole(family, self.lora)) if self.lora is not None else set()

        def placed(model: Any, name: str) -> None:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            prepare(module)
            parameter = dict(module.named_parameters(recurse=False)).get(leaf)
            if parameter is None or parameter.is_meta or whole & set(_parts_of(path)):
                return
            if self.lora is None and trains_fully(name, family, self.frozen):
                parameter.data = parameter.data.float()
            shard(parameter)

        with weight_by_weight(placed):
            yield


def _parts_of(path: str) -> Iterator[str]:
    """Every name by which `lora.modules_to_save` or a family may mean a module that this one is or lies in."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        for start in range(end):
            yield ".".join(parts[start:end])


def _give_back_what_is_freed() -> None:
    """glibc keeps freed blocks of up to 32 MB between those that stay; with a fixed limit every larger one goes back to the system: a
    quarter less of the host's memory, while shares of weights stay and the weights go."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 1 << 20)
