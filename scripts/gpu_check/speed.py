"""Training steps of Qwen2.5-VL-7B (random weights, NF4, adapters of rank 16): {1 row recomputed, 1 row, 4 rows, 4 samples
packed into a row} x kernels {off, auto}, and the same steps by TRL, TRL with Liger-Kernel and Unsloth, where they can be imported.

tokens/s: tokens of the rows, pictures' included, over the median step. MFU: FLOPs of the forward and backward pass as `vlm-dist plan`
counts them, over time and the card's dense bfloat16 peak.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from model import batch_of, configuration, on_device, packed_batch_of, random_model, trainable
from part import LeftOut, Part, version_of

STEPS, WARM = 10, 3
PACKED = "4 samples in a row"
ROWS = {"1 row, recomputed": (1, True), "4 rows": (4, True), "1 row": (1, False), PACKED: (1, False)}


def timed(part: Part, step: Callable[[], Any]) -> dict[str, float]:
    """Medians of the steps after the first few; `host_s` is how long the host was busy before the card was waited for."""
    steps, warm = (2, 1) if part.dry else (STEPS, WARM)
    whole, host = [], []
    if not part.dry:
        torch.cuda.reset_peak_memory_stats()
    for number in range(steps):
        begun = time.perf_counter()
        step()
        handed = time.perf_counter()
        if not part.dry:
            torch.cuda.synchronize()
        if number >= warm:
            whole.append(time.perf_counter() - begun)
            host.append(handed - begun)
    peak = 0 if part.dry else torch.cuda.max_memory_allocated()
    return {"step_s": statistics.median(whole), "host_s": statistics.median(host), "peak_bytes": peak}


def peak_flops() -> float | None:
    from vlm_dist.planning.gpus import this_gpu

    gpu = this_gpu()
    return gpu.flops if gpu else None


def flops_of_a_row(part: Part, folder: Path, processor: Any) -> int:
    """Of its forward and backward pass, nothing computed again; counted once, without a card."""
    from vlm_dist.models.load import read_model_config
    from vlm_dist.planning.count import count_micro_batch

    if "flops_of_a_row" not in part.results:
        name = str(folder)
        model = {"name": name, "dtype": "bfloat16", "gradient_checkpointing": False}
        config = configuration(folder, dry=part.dry, kernels="off", model=model)
        batch = batch_of(config, processor, 1, dry=part.dry)
        part.results["flops_of_a_row"] = count_micro_batch(config, *read_model_config(config.model, name), torch.bfloat16, batch).flops
    return part.results["flops_of_a_row"]


def ours(part: Part, folder: Path, label: str, kernels: str) -> dict[str, Any]:
    from vlm_dist.models.generate import autocast
    from vlm_dist.models.loss import summed_loss

    rows, recomputed = ROWS[label]
    model, processor, family = random_model(folder, part.device, dry=part.dry)
    config = configuration(folder, dry=part.dry, kernels=kernels)
    model, patches = trainable(model, family, config, kernels, checkpointing=recomputed)
    if label == PACKED:
        batch = packed_batch_of(config, processor, model, dry=part.dry)
    else:
        batch = batch_of(config, processor, rows, dry=part.dry)
    batch = on_device(batch, model, part.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=not part.dry)
    labels = int((batch["labels"] != -100).sum())

    def step() -> None:
        with autocast(model):
            loss = summed_loss(model, batch) / labels
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found: dict[str, Any] = timed(part, step)
    found["tokens_per_s"] = batch["input_ids"].numel() / found["step_s"]
    found["kernels"] = str(patches)
    if label == PACKED:  # attention within samples alone: other FLOPs
        return found
    found["flops"] = rows * flops_of_a_row(part, folder, processor)
    if peak := peak_flops():
        found["mfu"] = found["flops"] / found["step_s"] / peak
    return found


def by_trl(part: Part, folder: Path, rows: int, recomputed: bool, *, liger: bool) -> dict[str, Any]:
    """TRL's SFTTrainer on the same model, batch and optimizer; its own loss, logits of all rows."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model, processor, family = random_model(folder, part.device, dry=part.dry)
    config = configuration(folder, dry=part.dry, kernels="off")
    model, _ = trainable(model, family, config, "off", checkpointing=False)
    batch = batch_of(config, processor, rows, dry=part.dry)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2_5_vl

        try:  # it imports what it patches, and not every version has it
            from liger_kernel.transformers.model import qwen2_5_vl as _  # noqa: F401
        except ImportError as error:
            fits = f"liger-kernel {version_of('liger-kernel')} does not go with transformers {version_of('transformers')}"
            raise LeftOut(f"{fits}: {error}") from error
        apply_liger_kernel_to_qwen2_5_vl(model=model.get_base_model())
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not part.dry:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    steps, warm = (3, 1) if part.dry else (STEPS, WARM)
    arguments = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=steps, per_device_train_batch_size=rows, bf16=not part.dry, use_cpu=part.dry,
        gradient_checkpointing=recomputed, gradient_checkpointing_kwargs={"use_reentrant": False}, learning_rate=1e-4, report_to="none",
        save_strategy="no", logging_strategy="no", remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=False, optim="adamw_torch" if part.dry else "adamw_torch_fused",
    )  # fmt: skip
    if not part.dry:
        torch.cuda.reset_peak_memory_stats()
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict({"row": list(range(rows * steps))}), processing_class=processor,
        data_collator=lambda _: dict(batch), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    step_s = statistics.median(later - earlier for earlier, later in zip(ends[warm - 1 :], ends[warm:], strict=False))
    peak = 0 if part.dry else torch.cuda.max_memory_allocated()
    return {"step_s": step_s, "tokens_per_s": batch["input_ids"].numel() / step_s, "peak_bytes": peak}


def contenders(part: Part) -> Iterator[tuple[str, Callable[[Path], dict[str, Any]] | str]]:
    """What is measured, or why it is not; the most important first."""
    chosen = ["1 row", PACKED] if part.dry else list(ROWS)
    has_trl = importlib.util.find_spec("trl") and importlib.util.find_spec("datasets")
    has_liger = has_trl and importlib.util.find_spec("liger_kernel") and not part.dry
    for label in chosen:
        rows, recomputed = ROWS[label]
        for kernels in ("auto", "off"):
            yield f"ours, kernels {kernels}, {label}", lambda f, r=label, k=kernels: ours(part, f, r, k)
        if label != PACKED and has_liger:
            yield f"TRL + Liger, {label}", lambda f, r=rows, c=recomputed: by_trl(part, f, r, c, liger=True)
        elif label != PACKED:
            yield f"TRL + Liger, {label}", "liger_kernel needs to be installed, and a card"
    for label in chosen:
        rows, recomputed = ROWS[label]
        if label == PACKED:
            yield f"TRL, {label}", "TRL packs no samples with pictures"
        elif has_trl:
            yield f"TRL, {label}", lambda f, r=rows, c=recomputed: by_trl(part, f, r, c, liger=False)
        else:
            yield f"TRL, {label}", "trl is not installed"
    yield "Unsloth", "not installed" if not importlib.util.find_spec("unsloth") else "loads weights from a hub only; measured by hand"


def main() -> None:
    part = Part(__doc__)
    from vlm_dist.quiet import quiet_libraries

    quiet_libraries()
    for name, measure in contenders(part):
        if isinstance(measure, str):
            part.find("skipped", name, measure)
            continue
        with tempfile.TemporaryDirectory() as temporary:
            found = part.attempt(name, lambda measure=measure, temporary=temporary: measure(Path(temporary)))
        gc.collect()  # models hold themselves in circles
        if not part.dry:
            torch.cuda.empty_cache()
        if found:
            part.results[name] = found
            extra = f", MFU {found['mfu']:.1%}" if "mfu" in found else ""
            part.find("right", name, f"{found['tokens_per_s']:.0f} tokens/s, peak {found['peak_bytes'] / 1e9:.1f} GB{extra}")
    for label in ROWS:
        mine, peers = (
            part.results.get(f"ours, kernels auto, {label}"),
            [f"ours, kernels off, {label}", f"TRL, {label}", f"TRL + Liger, {label}"],
        )
        for peer in (name for name in peers if mine and name in part.results and not part.dry):
            ratio = mine["tokens_per_s"] / part.results[peer]["tokens_per_s"]
            part.judge(ratio >= 1, f"beside {peer}", f"{ratio:.2f} times as fast", "slow")
    part.write()


if __name__ == "__main__":
    main()
