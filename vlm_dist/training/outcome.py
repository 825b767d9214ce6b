"""What a run leaves behind: step metrics, held-out answers, the exported model, summary.json, and the words for people."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import statistics
import time
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from vlm_dist.config import Config, VideoConfig
from vlm_dist.data.samples import Sample
from vlm_dist.data.stream import Counts, Step, Stream
from vlm_dist.disk import again, why
from vlm_dist.distributed import Ranks
from vlm_dist.errors import BadSample, CheckpointError, DataError
from vlm_dist.redaction import redacted_tree
from vlm_dist.run_dir import DECISIVE_SECTIONS, RunDir, read_json, read_jsonl, write_json, write_text
from vlm_dist.training.log import Log, StepTimer
from vlm_dist.training.prepare import Loaded
from vlm_dist.training.progress import Progress

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)
THUMBNAIL = 128  # pixels on the longer side
STRIP = VideoConfig(min_frames=4, max_frames=4, max_pixels=THUMBNAIL**2)


def config_hash(config: Config) -> str:
    """sha256 of the sections that decide a run's numbers, secrets left out: what signs an address may be renewed."""
    decisive = {name: redacted_tree(value) for name, value in config.model_dump(mode="json").items() if name in DECISIVE_SECTIONS}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def announce(config: Config, run: RunDir, loaded: Loaded, stream: Stream, steps: int, done: int, log: Log) -> None:
    """What is about to be trained, line by line."""
    from vlm_dist.models.held import weights_in_words
    from vlm_dist.models.lora import count_trainable
    from vlm_dist.models.modes import WITH_BATCH_NORM, batch_norms, batch_norms_in_words

    counts = count_trainable(loaded.model, loaded.family)
    total = counts.pop("total")
    sides = ", ".join(f"{side} {number:,}" for side, number in sorted(counts.items()))
    form = "NF4" if config.model.load_in_4bit else str(loaded.dtype).removeprefix("torch.")
    log.say(f"run {run.path}: {loaded.family.model_type}, {total:,} parameters in {form}, {sum(counts.values()):,} trainable ({sides})")
    for line in [*loaded.choices, *weights_in_words(loaded.model, str(loaded.dtype).removeprefix("torch.")), f"kernels: {loaded.kernels}"]:
        log.say(line)
    if moving := batch_norms_in_words(batch_norms(loaded.model, loaded.family), config.training.micro_batch):
        log.say(f"{moving}: {WITH_BATCH_NORM}")
    if loaded.rehearsal:
        log.say(loaded.rehearsal)
    log.say(
        f"data: {stream.num_samples:,} samples in {stream.num_shards} shards; "
        f"{steps} steps of {config.training.global_batch} {'rows' if stream.pack else 'samples'}, {steps - done} to go"
    )


@dataclass(frozen=True)
class Shares:
    """Who computes how much of a step."""

    labels: list[float]
    """Supervised tokens of each data set, over all ranks."""
    slots: list[float]
    """Tokens that each rank computes, padding included."""
    patches: list[float]
    """Vision patches of each rank."""

    def metrics(self, names: list[str], loss_sums: list[float]) -> dict[str, Any]:
        """How far the rank with most to do is above the mean, and of a mixture the mean loss of each data set (null: no token)."""
        row: dict[str, Any] = {"imbalance": {"tokens": _excess(self.slots), "patches": _excess(self.patches)}}
        if len(names) > 1:
            means = [loss / labels if labels else math.nan for loss, labels in zip(loss_sums, self.labels, strict=True)]
            row["loss_by_dataset"] = {name: mean if math.isfinite(mean) else None for name, mean in zip(names, means, strict=True)}
        return row


def count_over_ranks(step: Step, ranks: Ranks) -> tuple[Counts, Shares]:
    """The totals of a step over all ranks, rows that several share counted once, and each rank's part."""
    counts = astuple(step.counts)
    own = [*counts, *step.labels] if ranks.is_first_of_rows else [0] * (len(counts) + len(step.labels))
    sums, (slots, patches) = ranks.sum_and_gather(own, step.counts.slots, step.counts.patches)
    totals: list[Any] = [int(value) if float(value).is_integer() else value for value in sums]  # labels have weights
    return Counts(*totals[: len(counts)]), Shares(totals[len(counts) :], slots, patches)


def refuse_useless(progress: Progress, config: Config, stream: Stream, steps: int) -> None:
    """A run that learns from nothing, or from less than half of its samples, must not end as if all were well. Small data sets are judged
    after their first epoch; the first 1,000 samples of a rank are judged by the quarantine.

    Raises:
        DataError: on every rank alike.
    """
    drawn = progress.data_step * stream.global_batch
    if progress.data_step != progress.step or config.data.packing or drawn - stream.global_batch >= stream.num_samples:
        return
    if drawn < stream.num_samples and progress.step < steps:
        return
    bad = drawn - progress.samples
    if progress.samples == 0 or bad > max(0.5, config.data.max_bad_fraction) * drawn:
        known = read_jsonl(stream.quarantine.path)
        last = f"; the last ({known[-1]['key']}): {known[-1]['reason']}" if known else ""
        raise DataError(f"data: {bad} of the first {drawn} samples are unusable{last}; all are named in {stream.quarantine.path}")


def _excess(values: list[float]) -> float:
    mean = statistics.fmean(values)
    return round(max(values) / mean - 1, 4) if mean else 0.0


def step_metrics(
    progress: Progress, counts: Counts, loss: float, lr: float, grad_norm: float, timer: StepTimer, busy_s: list[float], ranks: Ranks
) -> dict[str, Any]:
    """One line of metrics.jsonl. Tokens and samples are totals over all ranks since the run began; rates are this step's. What is not
    finite is null."""
    seconds = timer.seconds
    slowest = max(range(len(busy_s)), key=busy_s.__getitem__)
    return {
        "step": progress.step,
        "loss": loss if math.isfinite(loss) else None,
        "lr": lr,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "samples": progress.samples,
        "tokens": progress.tokens,
        "label_tokens": progress.label_tokens,
        "samples_per_s": round(counts.samples / seconds, 3),
        "tokens_per_s": round(counts.tokens / seconds, 1),
        "step_s": round(seconds, 5),
        "data_wait_s": round(timer.data_wait_s, 5),
        "busy_s": {"mean": round(statistics.fmean(busy_s), 5), "max": round(busy_s[slowest], 5), "slowest_rank": slowest},
        "padding_fraction": round(1 - counts.tokens / max(1, counts.slots), 4),
        "peak_memory_bytes": peak_memory(ranks),
    }


def peak_memory(ranks: Ranks) -> int:
    """Most bytes held at once: on the GPU, or resident in memory where there is none."""
    if ranks.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(ranks.device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _small(sample: Sample) -> Image | None:
    """Of a sample its first picture, or a strip of its first video."""
    from torchvision.transforms.functional import to_pil_image

    from vlm_dist.data.view import strip

    if sample.images:
        picture = sample.images[0].copy()
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        return picture
    if not sample.videos:
        return None
    try:
        shown = sample.videos[0].shown(STRIP)
    except BadSample:  # damaged between the frames that were answered about
        return None
    return strip([to_pil_image(frame) for frame in shown.frames], shown.times, THUMBNAIL // 2)


def write_answers(run: RunDir, phase: str, rows: list[dict[str, Any]], numbers: list[int], heldout: list[Sample]) -> None:
    """samples/PHASE.jsonl, one answer a line, and a thumbnail of each sample's first picture.

    Args:
        numbers: of each row, the place of its sample in `heldout`: keys may be equal.
    """
    thumbnails = run.samples / "thumbnails"
    thumbnails.mkdir(parents=True, exist_ok=True)
    lines = []
    for row, number in zip(rows, numbers, strict=True):
        sample = heldout[number]
        picture = _small(sample)
        name = f"{number:05d}.png" if picture is not None else None
        if picture is not None:  # one of an earlier start may be of other held-out samples
            picture.save(thumbnails / f"{number:05d}.png")
        lines.append(json.dumps({**row, "thumbnail": f"thumbnails/{name}" if name else None, "number": number}, ensure_ascii=False) + "\n")
    write_text(run.samples / f"{phase}.jsonl", "".join(lines))


def export(config: Config, run: RunDir, engine: Any, loaded: Loaded, ranks: Ranks, log: Log) -> None:
    """The final adapter (loads with plain PEFT) or model (loads with plain transformers), and the processor beside it."""
    from vlm_dist.checkpoints.snapshot import gather_weights
    from vlm_dist.inputs.prompts import only_one
    from vlm_dist.models.card import model_card
    from vlm_dist.models.record import make_record
    from vlm_dist.models.source import brings_code

    weights = gather_weights(engine, keep=ranks.is_first, frozen=config.lora is None)
    base = loaded.model.get_base_model().loaded_as if config.lora is not None else None
    system = only_one(loaded.prompts.over_ranks(ranks))
    record = make_record(engine.module, loaded.processor, base, loaded.fingerprint, system) if base is not None else None
    if not ranks.is_first:
        return
    from safetensors import SafetensorError

    from vlm_dist.models.save import save_adapter, save_model

    out = run.model if record is None else run.adapter
    try:
        if record is None or base is None:
            save_model(engine.module, weights, loaded.processor, out, system)
        else:
            card = model_card(config, base.name, log.evaluations(), own_code=brings_code(base.name, base.revision))
            save_adapter(engine.module, weights, loaded.processor, out, record, card)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written, {why(error)}; the last checkpoint is intact. {again(error)}") from None


def has_result(config: Config, run: RunDir, ranks: Ranks) -> bool:
    """Whether what a finished run made is there and whole; else it is exported again, from the last checkpoint. Every rank must call it.

    Raises:
        CheckpointError: there is no checkpoint to export it from.
    """
    from vlm_dist.checkpoints.form import find_checkpoints
    from vlm_dist.models.files import RECORD, problem_of

    out = run.model if config.lora is None else run.adapter
    problem = problem_of(out) if out.exists() else f"{out}: is missing"
    if problem is None and not (out / RECORD).exists() and not any(out.glob("*.safetensors")):
        problem = f"{out}: holds no weights"
    problem, left = ranks.gather((problem, bool(find_checkpoints(run.checkpoints))))[0]
    if problem is None:
        return True
    if not left:
        raise CheckpointError(
            f"{problem}; the run is finished, and no checkpoint is left to export it from. Put it back, or train again under another name"
        )
    if ranks.is_first:
        print(f"{problem}; the run is finished: exporting it again from its last checkpoint", flush=True)
    return False


def record_failure(run: RunDir, ranks: Ranks, reason: str) -> None:
    """summary.json of a run that ended with a user error. On a full disk it stays unwritten: the reason is what must be told."""
    if ranks.is_first:
        nothing = {"before": None, "during": [], "after": None}
        try:
            write_json(run.summary, {"ended": "failed", "reason": reason, "eval": nothing, "wall_s": None})
        except OSError as error:
            logger.warning("%s cannot be written: %s", run.summary, error)


def goodput(run: RunDir, productive_s: float) -> float | None:
    """Share of the time in which the run's processes lived, over all its starts, that went into steps that count. The rest: loading,
    evaluating, saving, steps left out, and what was lost in crashes."""
    this = read_json(run.beat(0))
    if this is None:
        return None
    lived = sum(start["ended"] - start["started"] for start in read_jsonl(run.starts)) + time.time() - this["started"]
    return round(productive_s / max(lived, 1e-9), 4)
