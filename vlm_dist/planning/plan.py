"""What a configuration will need on some GPU, what else would fit, and the best settings; from the checkpoint's config.json, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vlm_dist.config import Config
from vlm_dist.data.pictures import Size
from vlm_dist.deepspeed_config import check_batches, zero_stage
from vlm_dist.errors import ConfigError, DataError, MachineError
from vlm_dist.inputs.opened import Inputs, inputs_apart
from vlm_dist.inputs.workload import Workload, assumed, micro_batch
from vlm_dist.models.features import check_features
from vlm_dist.models.shared_rows import check_sequence, shareable

if TYPE_CHECKING:
    import torch

    from vlm_dist.planning.count import Counted
    from vlm_dist.planning.gpus import Gpu

Checkpointing = bool | str | dict[Any, Any]
MODES: dict[str, Checkpointing] = {"none": False, "vision": {"vision": True}, "language": {"language": True}, "all": True}
ROUNDED = 64  # tokens that a row's length is rounded down to
ASSUMED: tuple[Size, ...] = ((1024, 1024), (512, 512), (256, 256), (56, 56))


@dataclass
class Planner:
    """A model on a GPU, counted as often as it is asked."""

    config: Config
    """The inputs' own, its number type chosen."""
    inputs: Inputs
    gpu: Gpu
    gpus: int
    workload: Workload
    note: Callable[[str], object]
    _counted: dict[tuple, Counted] = field(default_factory=dict)

    def count(self, config: Config, rows: int, tokens: int | None = None) -> Counted:
        """One micro-batch of so many rows."""
        key = _mode_of(config), rows, tokens or self.workload.tokens, experts_of(config)
        if key not in self._counted:
            self._counted[key] = self._count(config, rows, tokens)
        return self._counted[key]

    def _count(self, config: Config, rows: int, tokens: int | None) -> Counted:
        from vlm_dist.planning.count import count_micro_batch

        name = _mode_of(config)
        self.note(f"counting {rows} x {tokens or self.workload.tokens} tokens, gradient checkpointing: {name}")
        batch = micro_batch(self.inputs.encoder, self.workload, rows, tokens, config.engine.sequence_parallel)
        return count_micro_batch(
            config, self.inputs.hf_config, self.inputs.family, torch_dtype(config), batch, accumulates=self.rounds(rows) > 1
        )

    def rounds(self, rows: int) -> int:
        return max(1, self.config.training.global_batch // (rows * self.replicas))

    @property
    def replicas(self) -> int:
        """GPUs, or groups of them that share rows."""
        return self.gpus // self.config.engine.sequence_parallel

    def total(self, config: Config, counted: Counted) -> int:
        from vlm_dist.planning.memory import memory_of

        return memory_of(counted, config, zero_stage(config, self.gpus), self.gpus).total

    def describe(self, config: Config, rows: int, counted: Counted) -> dict[str, Any]:
        """The numbers of one choice of settings."""
        from vlm_dist.planning.memory import memory_of, time_of

        stage = zero_stage(config, self.gpus)
        memory = memory_of(counted, config, stage, self.gpus)
        time = time_of(counted, self.gpu, self.rounds(rows), self.gpus)
        tokens = self.workload.tokens * rows * self.rounds(rows) * self.replicas
        return {
            "gradient_checkpointing": _mode_of(config),
            "micro_batch": rows,
            "micro_batches_a_step": self.rounds(rows),
            "zero_stage": stage,
            "sequence_parallel": config.engine.sequence_parallel,
            "memory": memory.parts,
            "total": memory.total,
            "host": memory.host,
            "loading": memory.loading,
            "fits": max(memory.total, memory.loading) <= self.gpu.memory,
            "flops": {"forward": counted.forward_flops, "vision": counted.vision_flops, "backward": counted.backward_flops},
            "features_kept": config.data.cache_features,
            "step_s": {"limit": time.limit, "fast": time.fast, "slow": time.slow},
            "tokens_per_s": {"limit": tokens / time.limit, "fast": tokens / time.fast, "slow": tokens / time.slow},
        }

    def choices(self) -> Iterator[dict[str, Any]]:
        """By what is recomputed: the largest micro-batch that fits, and what one row of it takes; where not even one row fits, none."""
        for mode in MODES.values():
            config = _with(self.config, mode, 1)
            counted = self.count(config, 1)
            one = self.describe(config, 1, counted)
            if not one["fits"]:
                yield one
                continue
            rows = self._most_rows(config, counted)
            yield one if rows == 1 else self.describe(config, rows, self.count(config, rows))

    def _most_rows(self, config: Config, counted: Counted) -> int:
        """Among the divisors of a rank's share of the global batch."""
        share = self.config.training.global_batch // self.replicas
        fixed = self.total(config, counted) - counted.peak
        fitting = [rows for rows in range(1, share + 1) if share % rows == 0 and fixed + 1.1 * rows * counted.peak <= self.gpu.memory]
        return max(fitting, default=1)

    def longest_row(self, config: Config) -> int:
        """Most tokens of a row that fit with this micro-batch, the pictures being the same; 0: not even the pictures."""
        rows = config.training.micro_batch
        low, high = self.workload.tokens, 2 * self.workload.tokens
        first, second = (self.total(config, self.count(config, rows, tokens)) for tokens in (low, high))
        slope = max(1.0, (second - first) / (high - low))
        tokens = int(low + (self.gpu.memory - first) / slope) // ROUNDED * ROUNDED
        return max(0, tokens)


def new_planner(
    inputs: Inputs, gpu: Gpu, gpus: int, *, size: Size | None = None, pictures: int = 1, note: Callable[[str], object] = lambda _: None
) -> Planner:
    """Look at the data, and count nothing yet.

    Args:
        size: assume rows of data.max_seq_length tokens with so many `pictures` of this size; None: measure data.train, and where that
            cannot be read, assume one picture a row.
        note: is told what is being counted.
    """
    config = inputs.config
    check_batches(config, gpus)
    check_sequence(inputs.family, inputs.hf_config, config.engine.sequence_parallel)
    check_features(config, inputs.family, inputs.hf_config, gpus)
    if config.model.dtype == "auto":
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    return Planner(config, inputs, gpu, gpus, _workload(inputs, size, pictures), note)


@contextmanager
def open_planner(config: Config, gpu: Gpu, gpus: int, **options: Any) -> Iterator[Planner]:
    """The same from the checkpoint's config.json and processor; see `new_planner`."""
    check_batches(config, gpus)
    with inputs_apart(config) as inputs:
        yield new_planner(inputs, gpu, gpus, **options)


def make_plan(planner: Planner, *, others: bool = True) -> dict[str, Any]:
    """The configuration's own settings, and with `others` what else would fit. Where lora.experts is left open, "experts" says what
    memory allows: "off" (then all of the plan is without adapters on experts), and why."""
    planner, why = settle_experts(planner)
    config, gpu = planner.config, planner.gpu
    rows = config.training.micro_batch
    own = planner.describe(config, rows, planner.count(config, rows))
    plan = {
        "name": config.name,
        "model": config.model.name or "from parts",
        "gpu": {"name": gpu.name, "memory": gpu.memory, "tflops": gpu.flops / 1e12, "gb_per_s": gpu.bandwidth / 1e9},
        "gpus": planner.gpus,
        "row": {"tokens": planner.workload.tokens, "pictures": list(planner.workload.pictures), "why": planner.workload.why},
        "own": own,
        "row_shared_by": shareable(planner.inputs.family, planner.inputs.hf_config),
        "weights": weights_in_16bit(planner),
        "all_to_all": planner.count(config, rows).sent,
        "experts": {"chosen": experts_of(config), "why": why},
    }
    if others:
        plan["choices"] = list(planner.choices())
        plan["longest_row"] = planner.longest_row(config)
    return plan


def settle_experts(planner: Planner) -> tuple[Planner, str]:
    """Adapters on experts that lora.experts: auto would make, left off where a step with them does not fit the card and one without them
    does; and why, in words."""
    from vlm_dist.planning.twin import adapts_experts

    config, gpu, rows = planner.config, planner.gpu, planner.config.training.micro_batch
    if experts_of(config) != "auto":
        return planner, ""
    whole = planner.describe(config, rows, planner.count(config, rows))
    if whole["fits"] or not adapts_experts(config, planner.inputs.hf_config, planner.inputs.family, torch_dtype(config)):
        return planner, ""
    off = without_experts(config)
    less = planner.describe(off, rows, planner.count(off, rows))
    if not less["fits"]:
        return planner, ""
    sizes = [max(plan["total"], plan["loading"]) / 1e9 for plan in (whole, less)]
    words = f"with adapters on experts a step needs {sizes[0]:.1f} GB, without {sizes[1]:.1f} GB; {gpu.name} has {gpu.memory / 1e9:.1f} GB"
    return replace(planner, config=off), f"lora.experts=auto: off, by memory ({words})"


def experts_of(config: Config) -> str:
    """lora.experts; off where there are no adapters."""
    return config.lora.experts if config.lora is not None else "off"


def without_experts(config: Config) -> Config:
    """The same with lora.experts: off."""
    assert config.lora is not None
    return config.model_copy(update={"lora": config.lora.model_copy(update={"experts": "off"})})


def weights_in_16bit(planner: Planner) -> list[str]:
    """What stays in 16 bit beside 4-bit weights, and what has no adapter, in words."""
    from vlm_dist.planning.twin import weights_of_twin

    return weights_of_twin(planner.config, planner.inputs.hf_config, planner.inputs.family, torch_dtype(planner.config))


def torch_dtype(config: Config) -> torch.dtype:
    """What a plan computes in; auto: what a new GPU does."""
    import torch

    return torch.bfloat16 if config.model.dtype == "auto" else getattr(torch, config.model.dtype)


def best_of(plan: dict[str, Any]) -> dict[str, Any]:
    """The quickest of the choices that fit.

    Raises:
        MachineError: none does.
    """
    fitting = [choice for choice in plan["choices"] if choice["fits"]]
    if not fitting:
        least, shared = min(choice["total"] for choice in plan["choices"]), plan["own"]["sequence_parallel"]
        more = [number for number in plan["row_shared_by"] if number > shared]
        raise MachineError(
            f"plan: nothing fits {plan['gpu']['name']} ({plan['gpu']['memory'] / 1e9:.1f} GB): one row of {plan['row']['tokens']} tokens "
            f"takes {least / 1e9:.1f} GB at the least{f', shared by {shared} GPUs' if shared > 1 else ''}; lower data.max_seq_length, use "
            "smaller pictures (model.processor), or a larger card"
            + (f", or --gpus of a multiple of {', '.join(map(str, more))}: so many can share a row" if more else "")
        )
    return min(fitting, key=lambda choice: choice["step_s"]["fast"])


def settings_of(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice as dotted settings."""
    shared = choice["sequence_parallel"]
    return {
        "training.micro_batch": choice["micro_batch"],
        "model.gradient_checkpointing": MODES[choice["gradient_checkpointing"]],
        **({"engine.sequence_parallel": shared} if shared > 1 else {}),
    }


def _workload(inputs: Inputs, size: Size | None, pictures: int) -> Workload:
    if size is not None:
        return assumed(inputs.config, inputs.encoder, size, pictures)
    try:
        return inputs.workload
    except DataError as error:
        found = _any_picture(inputs)
        return replace(found, why=f"{found.why}, because data.train cannot be measured ({str(error).split(';')[0]})")


def _any_picture(inputs: Inputs) -> Workload:
    """The largest of some usual sizes whose tokens fit a row."""
    *larger, least = ASSUMED
    for size in larger:
        with suppress(ConfigError):
            return assumed(inputs.config, inputs.encoder, size, 1)
    return assumed(inputs.config, inputs.encoder, least, 1)


def _mode_of(config: Config) -> str:
    wanted = config.model.gradient_checkpointing
    if isinstance(wanted, bool):
        return "all" if wanted else "none"
    return next((name for name, mode in MODES.items() if mode == wanted), str(wanted))


def _with(config: Config, mode: Checkpointing, rows: int) -> Config:
    model = config.model.model_copy(update={"gradient_checkpointing": mode})
    return config.model_copy(update={"model": model, "training": config.training.model_copy(update={"micro_batch": rows})})
