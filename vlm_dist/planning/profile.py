"""Where the time, the launches and the kept bytes of a micro-batch go: by operation and by part of the model. Counted, not run."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from vlm_dist.config import Config
from vlm_dist.data.encoded import count_patches
from vlm_dist.inputs.workload import micro_batch
from vlm_dist.planning.count import Counted, count_micro_batch, seconds_of
from vlm_dist.planning.gpus import Gpu
from vlm_dist.planning.plan import Planner, torch_dtype


def profile(planner: Planner, config: Config | None = None) -> dict[str, Any]:
    """A micro-batch of the configuration's own settings; see `described`.

    Args:
        config: other settings of the same model, such as other kernels.
    """
    config = config or planner.config
    rows = config.training.micro_batch
    planner.note(f"counting {rows} x {planner.workload.tokens} tokens by part, kernels: {config.kernels}")
    batch = micro_batch(planner.inputs.encoder, planner.workload, rows, multiple=planner.config.engine.sequence_parallel)
    inputs = planner.inputs
    counted = count_micro_batch(
        config, inputs.hf_config, inputs.family, torch_dtype(config), batch, accumulates=planner.rounds(rows) > 1, by_part=True
    )
    return described(counted, planner.gpu, batch["input_ids"].numel(), count_patches(batch))


def described(counted: Counted, gpu: Gpu, tokens: int, patches: int) -> dict[str, Any]:
    """The profile of what was counted by part.

    Args:
        tokens: places of the language model's rows.
        patches: of the vision tower, see `count_patches`.

    Returns:
        `launches`, `moved_bytes`, `roofline_ms` (each operation at the roofline of its own FLOPs and bytes, or as fast as one can be
        launched), `limit_ms` (products alone), `share` of the two, `kept_bytes` for the backward pass a language token and layer, and a
        patch and vision block, `device_waits`, what is waited for, and `rows` by part and operation, the longest first.
    """
    seconds = counted.seconds(gpu.flops, gpu.bandwidth)
    limit = counted.flops / gpu.flops
    language, vision = (tokens * counted.blocks["language"], patches * counted.blocks["vision"])
    return {
        "launches": sum(counted.work.values()),
        "moved_bytes": sum(one.moved * number for one, number in counted.work.items()),
        "roofline_ms": round(1e3 * seconds, 2),
        "limit_ms": round(1e3 * limit, 2),
        "share": round(limit / seconds, 3) if seconds else 0.0,
        "kept_bytes": {
            "language_token_layer": round((counted.saved - counted.saved_vision) / max(1, language), 1),
            "vision_patch_block": round(counted.saved_vision / max(1, vision), 1),
            "parts": dict(counted.kept.most_common()),
        },
        "device_waits": sum(counted.waits.values()),
        "waits": dict(counted.waits.most_common()),
        "rows": _rows(counted, gpu),
    }


def _rows(counted: Counted, gpu: Gpu) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = defaultdict(lambda: {"launches": 0, "moved_bytes": 0, "flops": 0, "roofline_ms": 0.0})
    for one, number in counted.work.items():
        row = found[one.part, one.name]
        row["launches"] += number
        row["moved_bytes"] += one.moved * number
        row["flops"] += one.flops * number
        row["roofline_ms"] += 1e3 * number * seconds_of(one, gpu.flops, gpu.bandwidth)
    rows = [{"part": part, "operation": name, **row, "roofline_ms": round(row["roofline_ms"], 4)} for (part, name), row in found.items()]
    return sorted(rows, key=lambda row: -row["roofline_ms"])


def by(rows: list[dict[str, Any]], what: str) -> dict[str, dict[str, float]]:
    """The rows added up by "part" or by "operation", the longest first."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        for name in ("launches", "moved_bytes", "flops", "roofline_ms"):
            sums[row[what]][name] += row[name]
    return dict(sorted(sums.items(), key=lambda item: -item[1]["roofline_ms"]))
