"""The training loop, in the open."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist import distributed
from vlm_dist.checkpoints.form import kept_in_words
from vlm_dist.config import Config
from vlm_dist.data.heldout import read_heldout
from vlm_dist.data.stream import Step
from vlm_dist.deepspeed_config import check_batches
from vlm_dist.inputs.opened import open_inputs
from vlm_dist.models.features import check_features
from vlm_dist.models.going_on import settle
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.shared_rows import check_sequence, cutting
from vlm_dist.planning.fits import check_fits
from vlm_dist.quiet import quiet_libraries
from vlm_dist.scoring.evaluate import check_metrics
from vlm_dist.training import outcome
from vlm_dist.training.audit import FirstStep
from vlm_dist.training.engine import set_learning_rate, take_step
from vlm_dist.training.experts import as_begun
from vlm_dist.training.health import StopRequest, out_of_memory, poisoned_unless_finite
from vlm_dist.training.log import StepTimer
from vlm_dist.training.lost import let_speak, lost_rank
from vlm_dist.training.optim import learning_rate
from vlm_dist.training.placing import on_device
from vlm_dist.training.prepare import load_trainable, open_training_stream
from vlm_dist.training.progress import is_due
from vlm_dist.training.rehearsal import rehearse
from vlm_dist.training.session import Session
from vlm_dist.training.start import Start, begin
from vlm_dist.training.unchanged import describe_inputs
from vlm_dist.training.watchdog import beat_interval, first_beat, note_earlier_start
from vlm_dist.waiting import waiting

if TYPE_CHECKING:
    import torch


def train(config: Config, *, resume_anyway: bool = False, asked: Callable[[], int | None] | None = None) -> dict[str, Any]:
    """Train as the configuration says, or continue where the same run stopped; the same function under every launcher.

    Args:
        asked: where signals do not reach this process: called between steps, tells the number of one that asks to stop, or None.

    Returns:
        The content of summary.json.

    Raises:
        UserError: configuration, data, model, checkpoint or machine is not fit for it; says what to do.
    """
    quiet_libraries()
    run = os.path.abspath(Path(config.output_dir) / config.name)
    ranks = distributed.start(run, config.distributed.join_timeout_s, config.engine.device)
    config = settle(config)
    check_batches(config, ranks.world_size)
    ranks = replace(ranks, sharing=config.engine.sequence_parallel)
    check_metrics(config)
    started = time.monotonic()
    with begin(config, ranks, resume_anyway=resume_anyway) as start:
        finished = start.run.read_summary()
        if finished and finished["ended"] == "finished" and not resume_anyway and outcome.has_result(config, start.run, ranks):
            summary = {**finished, "already_finished": True}
        else:
            summary = _train(start, started, asked)
    distributed.stop_at_exit()
    return summary


def _train(start: Start, started: float, asked: Callable[[], int | None] | None) -> dict[str, Any]:
    import torch

    config, run, ranks = start.config, start.run, start.ranks
    if ranks.is_first:
        note_earlier_start(run)
    ranks.barrier()
    first_beat(run, ranks)
    stream = None
    try:
        inputs = open_inputs(config, run, ranks)
        check_sequence(inputs.family, inputs.hf_config, ranks.sharing)
        check_features(config, inputs.family, inputs.hf_config, ranks.world_size)
        inputs.check_first_samples()
        inputs.config = as_begun(inputs.config, run, ranks)
        check_fits(inputs, ranks)
        with waiting(f"loading {inputs.source}"):
            loaded = load_trainable(inputs, ranks)
        loaded.rehearsal = rehearse(inputs, loaded, ranks)
        loaded.described = describe_inputs(inputs, ranks)
        stream = open_training_stream(inputs, loaded.model, ranks)
        heldout = read_heldout(config.data, config.evaluation.samples, inputs.quarantine)
        with StopRequest(asked) as stop, Session(config, run, loaded, stream, heldout, ranks, started, stop) as session:
            return _run_loop(start, session)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(config, error, kept_in_words(run.checkpoints)) from None
    except RuntimeError as error:  # of a collective, where another rank is gone
        let_speak(ranks)
        if (lost := lost_rank(run, ranks, error, beat_interval(config.health.timeout_s))) is None:
            raise
        raise lost from None
    finally:
        if stream is not None:
            stream.close()
            if loaded.features is not None:
                loaded.features.close()


def _run_loop(start: Start, session: Session) -> dict[str, Any]:
    import torch

    config, engine, stream, ranks, log, watchdog, health, scale = (
        start.config, session.engine, session.stream, session.ranks, session.log, session.watchdog, session.health, session.scale
    )  # fmt: skip
    progress = session.restore(insist=start.resume_anyway)
    start.claim()
    outcome.announce(config, session.run, session.loaded, stream, session.steps, progress.step, log)
    session.catch_up(progress.step)
    saved, timer, audit = progress.step, StepTimer(ranks.device), FirstStep(engine.module, session.loaded.family)
    while progress.step < session.steps and not session.is_to_stop:
        watchdog.beat("reading", progress.step + 1)
        timer.begin()
        step = stream.next_step()
        timer.data_arrived()
        distributed.seed_step(config.seed, progress.data_step, ranks.rank)
        lr = learning_rate(config.optim, progress.step, session.steps)
        set_learning_rate(engine, lr)
        counts, shares = outcome.count_over_ranks(step, ranks)
        num_labels = counts.labels or 1  # the one denominator, over all micro-batches and ranks
        losses, grad_norm = _compute(session, step, num_labels, timer)
        while scale.overflowed(progress.step + 1, grad_norm, losses, ranks):  # float16 alone
            log.event("overflow", progress.step + 1, f"a gradient is too large for float16; again with a loss scale of {scale.value:g}")
            session.statistics.put_back()
            distributed.seed_step(config.seed, progress.data_step, ranks.rank)
            losses, grad_norm = _compute(session, step, num_labels, timer)
        watchdog.beat("adding up")
        loss_sums, (busy_s,) = ranks.sum_and_gather(torch.stack(losses).sum(0).reshape(-1).tolist(), timer.busy_s)
        mean_loss, step_s = sum(loss_sums) / num_labels, timer.seconds
        verdict = health.judge(progress.step + 1, mean_loss, grad_norm, step.keys, [loss.sum() for loss in losses])
        session.statistics.settle()
        health.watch_speed(progress.step + 1, busy_s)
        progress = progress.after(counts, session.wall_s, step_s, skipped=verdict == "skipped")
        metrics = outcome.step_metrics(progress, counts, mean_loss, lr, grad_norm, timer, busy_s, ranks)
        log.step(metrics | shares.metrics(stream.names, loss_sums) | scale.metrics() | session.metrics(num_labels))
        scale.fitted(progress.step)
        audit.tell(progress.step, counts, log)
        outcome.refuse_useless(progress, config, stream, session.steps)
        if verdict == "spike" and config.health.on_spike == "rollback" and (earlier := session.roll_back(progress)) is not None:
            progress, saved = earlier, earlier.step
            continue
        if is_due(config.checkpoint.save_every, progress.step):  # before an evaluation, which may take long
            saved = session.save(progress)
        if is_due(config.evaluation.every, progress.step) and progress.step < session.steps:
            session.evaluate(progress.step, "during")
    if saved < progress.step:
        session.save(progress)
    return session.finish(progress)


def _compute(session: Session, step: Step, num_labels: float, timer: StepTimer) -> tuple[list[torch.Tensor], float]:
    """The summed losses of a step's micro-batches, and the norm of its gradient; updates on the last of them."""
    engine, ranks, scale, experts = session.engine, session.ranks, session.scale, session.experts
    experts.begin()
    losses, grad_norm = [], 0.0
    with cutting(engine):
        for batch, there in zip(step.micro_batches, on_device(step.micro_batches, ranks.device), strict=True):
            session.watchdog.beat("computing")
            with timer.forward(), experts.forward():
                loss = summed_loss(engine, there)
            part = poisoned_unless_finite(loss.sum() + experts.balance(batch))
            part = part * (ranks.world_size / num_labels)  # DeepSpeed averages over ranks: undo
            engine.backward(scale.apply(part), scale_wrt_gas=False)
            grad_norm = take_step(engine, session.config.optim.grad_clip, scale.value)
            losses.append(loss.detach())
    return losses, grad_norm
