"""The training loop, in the open."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vlm_dist import distributed
from vlm_dist.config import Config
from vlm_dist.data.encode import Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.data.stream import Counts, Stream, open_stream, read_heldout
from vlm_dist.distributed import Ranks
from vlm_dist.errors import UserError
from vlm_dist.quiet import quiet_libraries
from vlm_dist.run_dir import RunDir
from vlm_dist.training import outcome
from vlm_dist.training.checkpoint import load_checkpoint, newest_good_checkpoint, save_checkpoint
from vlm_dist.training.engine import check_batches, set_learning_rate, start_engine, take_step
from vlm_dist.training.evaluate import evaluate
from vlm_dist.training.health import Health, StopRequest, out_of_memory, poisoned_unless_finite
from vlm_dist.training.log import Log, StepTimer
from vlm_dist.training.loss import summed_loss
from vlm_dist.training.optim import learning_rate
from vlm_dist.training.prepare import Loaded, count_steps, load_trainable, open_quarantine, write_environment
from vlm_dist.training.watchdog import Watchdog, note_earlier_start


@dataclass(frozen=True)
class Progress:
    """Totals over all ranks since the run began, over every start of it."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    label_tokens: int = 0
    wall_s: float = 0.0
    productive_s: float = 0.0
    """Seconds of the steps that count: not of those left out, rolled back or lost in a crash."""
    data_step: int = 0
    """Steps of data used; more than `step` after a rollback."""

    def after(self, counts: Counts, wall_s: float, step_s: float) -> Progress:
        """The totals after one more step."""
        return Progress(
            step=self.step + 1,
            samples=self.samples + counts.samples,
            tokens=self.tokens + counts.tokens,
            label_tokens=self.label_tokens + counts.labels,
            wall_s=round(wall_s, 3),
            productive_s=round(self.productive_s + step_s, 3),
            data_step=self.data_step + 1,
        )


def train(config: Config, *, resume_anyway: bool = False) -> dict[str, Any]:
    """Train as the configuration says, or continue where the same run stopped; the same function under every launcher.

    Returns:
        The content of summary.json.

    Raises:
        UserError: configuration, data, model, checkpoint or machine is not fit for it; says what to do.
    """
    import torch

    quiet_libraries()
    ranks = distributed.start()
    check_batches(config, ranks.world_size)
    run = RunDir.open(config, resume_anyway=resume_anyway, write=ranks.is_first)
    finished = run.read_summary()
    if finished and finished["ended"] == "finished" and Path(finished["result"]).exists() and not resume_anyway:
        return {**finished, "already_finished": True}
    write_environment(run, ranks)
    if ranks.is_first:
        note_earlier_start(run)
    ranks.barrier()
    stream = None
    started = time.monotonic()
    try:
        loaded = load_trainable(config, run, ranks)
        quarantine = open_quarantine(config, run)
        batch = {"global_batch": config.training.global_batch, "micro_batch": config.training.micro_batch}
        place = {"rank": ranks.rank, "world_size": ranks.world_size}
        stream = open_stream(config.data, loaded.processor, quarantine, seed=config.seed, **batch, **place)
        heldout = read_heldout(config.data, config.evaluation.samples, quarantine)
        return _run_loop(config, run, loaded, stream, heldout, ranks, started)
    except torch.OutOfMemoryError as error:
        problem = out_of_memory(config, error)
        outcome.record_failure(run, ranks, str(problem))
        raise problem from None
    except UserError as error:
        outcome.record_failure(run, ranks, str(error))
        raise
    finally:
        if stream is not None:
            stream.close()


def _run_loop(
    config: Config, run: RunDir, loaded: Loaded, stream: Stream, heldout: list[Sample], ranks: Ranks, started: float
) -> dict[str, Any]:
    steps = count_steps(config, stream.num_samples)
    engine = start_engine(loaded.model, loaded.family, config, loaded.dtype, ranks)
    with StopRequest() as stop, Log(run, config, ranks, steps) as log, Watchdog(run, ranks, config.health.timeout_s, started) as watchdog:
        health = Health(config.health, log, ranks)
        progress = _restore(run, engine, stream, loaded, health, log)
        outcome.announce(config, run, loaded, stream, steps, progress.step, log)
        scorer = Scorer(config, run, engine, stream.encoder, heldout, ranks, log, watchdog)
        if progress.step == 0:
            scorer.score(0, "before")
        saved, timer, wall_before = progress.step, StepTimer(ranks.device), progress.wall_s
        while progress.step < steps and not ranks.any(stop.requested):
            watchdog.beat("reading", progress.step + 1)
            timer.begin()
            step = stream.next_step()
            timer.data_arrived()
            distributed.seed_step(config.seed, progress.data_step, ranks.rank)
            lr = learning_rate(config.optim, progress.step, steps)
            set_learning_rate(engine, lr)
            counts = Counts(*map(int, ranks.sums(astuple(step.counts))))
            num_labels = max(1, counts.labels)  # the one denominator, over all micro-batches and ranks
            losses, grad_norm = [], 0.0
            for batch in step.micro_batches:
                watchdog.beat("computing")
                with timer.forward():
                    loss = summed_loss(engine, {name: tensor.to(ranks.device, non_blocking=True) for name, tensor in batch.items()})
                part = poisoned_unless_finite(loss) * (ranks.world_size / num_labels)  # DeepSpeed averages over ranks: undo
                engine.backward(part, scale_wrt_gas=False)
                grad_norm = take_step(engine, config.optim.grad_clip)  # updates on the last micro-batch only
                losses.append(loss.detach())
            watchdog.beat("adding up")
            loss_sum, busy_s = ranks.sum_and_gather(float(sum(losses)), timer.busy_s)
            mean_loss, step_s = loss_sum / num_labels, timer.seconds
            verdict = health.judge(progress.step + 1, mean_loss, grad_norm, step.keys, losses)
            health.watch_speed(progress.step + 1, busy_s)
            progress = progress.after(counts, wall_before + time.monotonic() - started, 0.0 if verdict == "skipped" else step_s)
            log.step(outcome.step_metrics(progress, counts, mean_loss, lr, grad_norm, timer, busy_s, ranks))
            if verdict == "spike" and health.may_roll_back(progress.step):
                progress = _roll_back(run, engine, loaded, progress, log)
                continue
            if _due(config.evaluation.every, progress.step) and progress.step < steps:
                scorer.score(progress.step, "during")
            if _due(config.checkpoint.save_every, progress.step):
                watchdog.beat("saving")
                saved = _save(config, run, engine, stream, loaded, health, progress, ranks)
        if saved < progress.step:
            _save(config, run, engine, stream, loaded, health, progress, ranks)
        progress = replace(progress, wall_s=round(wall_before + time.monotonic() - started, 3))
        if progress.step < steps:
            return outcome.interrupted(config, run, progress, stop, health, ranks, log)
        scorer.score(progress.step, "after")
        outcome.export(config, run, engine, loaded, ranks, log)
        progress = replace(progress, wall_s=round(wall_before + time.monotonic() - started, 3))
        return outcome.finished(config, run, progress, stream, health, ranks, log)


class Scorer:
    """Evaluates on the held-out samples and keeps the answers, where there are any."""

    def __init__(
        self, config: Config, run: RunDir, engine: Any, encoder: Encoder, heldout: list[Sample], ranks: Ranks, log: Log, watchdog: Watchdog
    ):
        self.config, self.run, self.engine, self.encoder = config, run, engine, encoder
        self.heldout, self.ranks, self.log, self.watchdog = heldout, ranks, log, watchdog

    def score(self, step: int, phase: str) -> None:
        if not self.heldout:
            return
        beat = partial(self.watchdog.beat, "evaluating")
        evaluation = evaluate(self.engine.module, self.encoder, self.heldout, self.config.evaluation, self.ranks, beat)
        if phase != "during" and self.ranks.is_first:
            outcome.write_answers(self.run, phase, evaluation.rows, self.heldout)
        self.log.evaluation(step, phase, evaluation.scores)


def _restore(run: RunDir, engine: Any, stream: Stream, loaded: Loaded, health: Health, log: Log) -> Progress:
    checkpoint = newest_good_checkpoint(run.checkpoints)
    if checkpoint is None:
        log.rewind(-1)
        return Progress()
    state = load_checkpoint(checkpoint, engine, loaded.fingerprint)
    stream.restore(state["data"])
    health.restore(state["health"])
    log.rewind(state["step"])
    log.say(f"continuing from {checkpoint} (step {state['step']})")
    return Progress(**state["progress"])


def _roll_back(run: RunDir, engine: Any, loaded: Loaded, progress: Progress, log: Log) -> Progress:
    """Weights, optimizer and totals of the last checkpoint; the data goes on."""
    checkpoint = newest_good_checkpoint(run.checkpoints)
    if checkpoint is None:
        log.event("no rollback", progress.step, "there is no checkpoint yet; going on")
        return progress
    state = load_checkpoint(checkpoint, engine, loaded.fingerprint)
    log.rewind(state["step"])
    left_out = progress.step - state["step"]
    log.event("rollback", progress.step, f"back to {checkpoint.name}; the samples of {left_out} steps are left out", to=state["step"])
    return replace(Progress(**state["progress"]), data_step=progress.data_step, wall_s=progress.wall_s)


def _save(
    config: Config, run: RunDir, engine: Any, stream: Stream, loaded: Loaded, health: Health, progress: Progress, ranks: Ranks
) -> int:
    state = {
        "version": 2,
        "progress": vars(progress),
        "data": stream.state_after(progress.data_step),
        "health": health.state(),
        "rng": {"rule": "seeded by (seed, data_step, rank) at each step", "seed": config.seed},
        "config_sha256": outcome.config_hash(config),
        "base_fingerprint": loaded.fingerprint,
    }
    save_checkpoint(run.checkpoints, engine, progress.step, state, config.checkpoint.keep_last, ranks)
    return progress.step


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
