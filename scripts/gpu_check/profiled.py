"""One micro-batch looked at: how often the host waits for the card, how many kernels are launched, how long the card is idle, and
which attention ran."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model import batch_of, configuration, on_device, random_model, trainable
from part import Part

ATTENTION = ("flash", "fmha", "cutlass", "cudnn", "scaled_dot_product")
FEW_SYNCS, LONG_IDLE = 10, 0.25


def syncs(call: Callable[[], Any]) -> list[str]:
    """Where the host waited, a word for each time."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(one.filename).name}:{one.lineno}" for one in told if "synchroniz" in str(one.message)]


def timed(part: Part, call: Callable[[], Any]) -> tuple[float, float]:
    """Median microseconds of a micro-batch, and of the host in it, without a profiler."""
    whole, host = [], []
    for _ in range(1 if part.dry else 7):
        begun = time.perf_counter()
        call()
        handed = time.perf_counter()
        if not part.dry:
            torch.cuda.synchronize()
        whole.append(1e6 * (time.perf_counter() - begun))
        host.append(1e6 * (handed - begun))
    return statistics.median(whole), statistics.median(host)


def profile(part: Part, call: Callable[[], Any]) -> None:
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] if part.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    wall_us, host_us = timed(part, call)
    with torch.profiler.profile(activities=activities) as profiled:
        call()
        if not part.dry:
            torch.cuda.synchronize()
    rows = profiled.key_averages()
    on_card = [row for row in rows if str(row.device_type).endswith("CUDA")]
    busy_us = sum(row.self_device_time_total for row in on_card)
    launches = sum(row.count for row in on_card)
    attention = sorted({row.key[:90] for row in (rows if part.dry else on_card) if any(name in row.key.lower() for name in ATTENTION)})
    slowest = sorted(on_card or rows, key=lambda row: -(row.self_device_time_total or row.self_cpu_time_total))[:25]
    times = [{"name": row.key[:120], "count": row.count, "us": row.self_device_time_total or row.self_cpu_time_total} for row in slowest]
    times_us = {"wall_us": wall_us, "host_us": host_us, "busy_us": busy_us}
    part.results["profile"] = {**times_us, "launches": launches, "attention": attention, "slowest": times}
    part.judge(bool(attention), "attention", ", ".join(attention)[:200] or "no fused kernel among those that ran", "slow")
    if not part.dry:
        idle = 1 - busy_us / wall_us
        part.judge(idle < LONG_IDLE, "the card's idle share", f"{idle:.0%} of {wall_us / 1000:.0f} ms, {launches} launches", "slow")


def main() -> None:
    part = Part(__doc__)
    from vlm_dist.models.generate import autocast
    from vlm_dist.models.loss import summed_loss
    from vlm_dist.quiet import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, processor, family = random_model(folder, part.device, dry=part.dry)
        config = configuration(folder, dry=part.dry)
        model, patches = trainable(model, family, config, "auto", checkpointing=False)
        batch = on_device(batch_of(config, processor, 1, dry=part.dry), model, part.device)
        part.results["kernels"] = str(patches)

        def micro_batch() -> None:
            with autocast(model):
                loss = summed_loss(model, batch)
            loss.backward()

        for _ in range(2):  # compiles
            micro_batch()
        if part.dry:
            part.find("skipped", "waits of the host", "needs a card")
        else:
            waited = syncs(micro_batch)
            part.results["syncs"] = waited
            part.judge(len(waited) <= FEW_SYNCS, "waits of the host", f"{len(waited)} in a micro-batch", "slow")
        part.attempt("profile", lambda: profile(part, micro_batch))
    part.write()


if __name__ == "__main__":
    main()
