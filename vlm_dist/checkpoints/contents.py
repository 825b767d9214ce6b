"""What stands in state.json, as types: so that a state of another kind is known before anything is changed by it."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

Count = Annotated[int, Field(ge=0, le=2**48)]
Amount = Annotated[FiniteFloat, Field(ge=0)]


class Totals(BaseModel, extra="forbid", strict=True):
    """`training.progress.Progress`."""

    step: Count
    samples: Count = 0
    tokens: Count = 0
    label_tokens: Amount = 0.0
    wall_s: Amount = 0.0
    productive_s: Amount = 0.0
    data_step: Count = 0
    updates: Count


class LaneState(BaseModel, strict=True):
    """One row of the global batch, see `data.rows`."""

    counts: Annotated[list[Count], Field(min_length=1)]
    waiting: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = []
    sums: Annotated[list[Count], Field(min_length=3, max_length=3)] | None = None


class DataState(BaseModel, strict=True):
    """`data.stream.Stream.state`, of all ranks."""

    step: Count
    global_batch: Annotated[int, Field(ge=1)]
    packing: bool
    digests: Annotated[dict[str, str], Field(min_length=1)]
    lanes: dict[str, LaneState]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.lanes and self.lanes.keys() != {str(number) for number in range(self.global_batch)}:
            raise ValueError(f"holds {len(self.lanes)} lanes, of a global batch of {self.global_batch}")
        for lane in self.lanes.values():
            if len(lane.counts) != len(self.digests) or any(dataset >= len(self.digests) for dataset, _ in lane.waiting):
                raise ValueError("speaks of another number of data sets than it has digests")
        return self


class HealthState(BaseModel, strict=True):
    """`training.health.Health.state`."""

    skipped: Count
    rollbacks: Count
    losses: list[FiniteFloat]


class PatienceState(BaseModel, strict=True):
    """`scoring.evaluate.Patience.state`."""

    best: float | None
    since: Count


class ScaleState(BaseModel, strict=True):
    """`training.loss_scale.LossScale.state`."""

    used: bool
    value: Annotated[FiniteFloat, Field(gt=0)]
    good: Count
    overflows: Count
    history: list[list[FiniteFloat]]


class State(BaseModel, strict=True):
    """What continuing reads. Older checkpoints lack what has a default."""

    step: Count
    progress: Totals
    data: DataState
    health: HealthState
    patience: PatienceState
    base_fingerprint: str
    prompts: Annotated[list[str | None], Field(max_length=2)] = []
    inputs: dict[str, dict[str, Any]] = {}
    scores: dict[str, Any] | None = None
    owes: str | None = None
    loss_scale: ScaleState | None = None

    @model_validator(mode="after")
    def _is_of_one_step(self) -> Self:
        if self.progress.step != self.step:
            raise ValueError(f"is of step {self.step}, its totals of step {self.progress.step}")
        return self


def problem_of(state: Any) -> str | None:
    """What in a state cannot be continued from, in words; None: nothing."""
    try:
        State.model_validate(state)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        words = first["msg"].removeprefix("Value error, ")
        return f"{'.'.join(map(str, first['loc']))}: {words[0].lower()}{words[1:]}".removeprefix(": ")
    return None
