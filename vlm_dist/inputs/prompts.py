"""Which system prompts the samples of a training have: noticed on the way, so that what was trained can be asked with the same one."""

from __future__ import annotations

from typing import Any

from vlm_dist.data.encode import Encoded, Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.distributed import Ranks


class SystemPrompts:
    """The different ones of one rank; no more than two, which is one too many."""

    def __init__(self) -> None:
        self.found: list[str | None] = []

    def __deepcopy__(self, memo: Any) -> SystemPrompts:
        return self  # an encoder is copied for each thread, and all tell the same place

    def note(self, sample: Sample) -> None:
        first = sample.messages[0]
        said = "".join(part.get("text", "") for part in first["content"]) if first["role"] == "system" else None
        if said not in self.found and len(self.found) < 2:
            self.found.append(said)

    def restore(self, found: list[str | None]) -> None:
        """What earlier starts of the run have seen."""
        self.found = list(dict.fromkeys([*found, *self.found]))[:2]

    def over_ranks(self, ranks: Ranks) -> list[str | None]:
        """Those of all ranks; every rank must call it."""
        return list(dict.fromkeys(one for part in ranks.gather(self.found) for one in part))[:2]


def only_one(found: list[str | None]) -> str | None:
    """The prompt that every sample had; None: some had none, or another."""
    return found[0] if len(found) == 1 else None


class NotingEncoder(Encoder):
    """An encoder that notes the system prompt of every sample that is trained on, in `prompts`."""

    def __init__(self, *settings: Any, **named: Any):
        super().__init__(*settings, **named)
        self.prompts = SystemPrompts()

    def encode(self, sample: Sample) -> Encoded:
        encoded = super().encode(sample)
        self.prompts.note(sample)
        return encoded
