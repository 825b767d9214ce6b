"""What the training loop holds, and the moves that need several of these at once: continue, go back, save, evaluate."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vlm_dist.checkpoints.form import kept_in_words
from vlm_dist.checkpoints.saver import Saver
from vlm_dist.checkpoints.snapshot import load_checkpoint
from vlm_dist.config import Config
from vlm_dist.config_load import without_secrets
from vlm_dist.data.samples import Sample
from vlm_dist.data.stream import Stream, merge_states
from vlm_dist.data.tally import in_words, summed
from vlm_dist.distributed import Ranks
from vlm_dist.models.modes import Statistics
from vlm_dist.run_dir import RunDir, write_json
from vlm_dist.scoring.evaluate import EvaluationStopped, Patience, Watch, evaluate
from vlm_dist.scoring.metrics import LOWER_IS_BETTER
from vlm_dist.scoring.without_pictures import evaluate_whole
from vlm_dist.training import outcome
from vlm_dist.training.engine import start_engine
from vlm_dist.training.experts import ExpertWatch
from vlm_dist.training.health import Health, StopRequest
from vlm_dist.training.log import Log
from vlm_dist.training.loss_scale import LossScale
from vlm_dist.training.prepare import Loaded
from vlm_dist.training.progress import Progress, count_steps, interrupted_in_words, is_due
from vlm_dist.training.unchanged import compare_inputs
from vlm_dist.training.watchdog import Watchdog


class Session:
    """Use it as a context: leaving it waits for the last checkpoint and closes the logs.

    Args:
        started: when this start of the run began (time.monotonic).
        stop: who was asked to stop.
    """

    def __init__(
        self, config: Config, run: RunDir, loaded: Loaded, stream: Stream, heldout: list[Sample], ranks: Ranks, started: float,
        stop: StopRequest,
    ):  # fmt: skip
        self.stop = stop
        self.config, self.run, self.loaded, self.stream, self.heldout, self.ranks = config, run, loaded, stream, heldout, ranks
        self.steps = count_steps(config, stream, ranks)
        self.experts = ExpertWatch(loaded.model, config)
        self.engine = start_engine(loaded.model, loaded.family, config, loaded.dtype, ranks)
        self.statistics = Statistics(self.engine.module, ranks)
        self.scale = LossScale(self.engine, loaded.dtype)
        self.log = Log(run, config, ranks, self.steps)
        self.watchdog = Watchdog(run, ranks, config.health.timeout_s, started)
        self.health = Health(config.health, self.log, ranks, lambda: kept_in_words(run.checkpoints))
        lower = config.checkpoint.best_metric in LOWER_IS_BETTER
        self.saver = Saver(run, config, ranks, self.log.event, lower_is_better=lower)
        self._started, self._wall_before = started, 0.0
        self.patience = Patience(config.evaluation.patience, config.checkpoint.best_metric)
        self._scores: tuple[int, dict[str, Any]] | None = None
        self._owes_evaluation = self._told_grace = False
        self._parts = ExitStack()

    def __enter__(self) -> Session:
        for part in (self.log, self.watchdog, self.saver):
            self._parts.enter_context(part)
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._parts.__exit__(*error)
        finally:
            self.engine.destroy()  # its hooks hold buffers that outlive it, e.g. in a notebook

    @property
    def wall_s(self) -> float:
        """Seconds of the run so far, over all its starts since the checkpoints that they continued from."""
        return round(self._wall_before + time.monotonic() - self._started, 3)

    @property
    def is_to_stop(self) -> bool:
        """Whether any rank was asked to; all must ask."""
        return self.ranks.any(self.stop.requested)

    def metrics(self, num_labels: float) -> dict[str, Any]:
        """Of a step, where the model has experts, or features of its tower are kept."""
        features = self.loaded.features
        return self.experts.metrics(self.ranks, num_labels) | ({} if features is None else features.metrics())

    def restore(self, *, insist: bool = False) -> Progress:
        """Continue from the newest whole checkpoint, if there is one.

        Args:
            insist: though model, processor or data are not those that the run began with.

        Raises:
            CheckpointError: they are not; or no checkpoint is whole, or it does not fit the model.
        """
        checkpoint = self.saver.newest(insist=insist)
        if checkpoint is None:
            self.log.rewind(-1, events=True)
            return Progress()
        compare_inputs(checkpoint, self.loaded.described, self.ranks, self.log, insist=insist)
        state = self._put_back(checkpoint)
        self._owes_evaluation = state.get("owes") == "evaluation"
        self.stream.restore(state["data"])
        self.health.restore(state["health"])
        self.scale.restore(state.get("loss_scale"))
        self.loaded.prompts.restore(state.get("prompts", []))
        self.patience.restore(state["patience"])
        self._end_early(state["step"])
        self.log.rewind(state["step"], events=True)
        self.log.say(f"continuing from {checkpoint} (step {state['step']})")
        progress = Progress(**state["progress"])
        self._wall_before = progress.wall_s
        return progress

    def roll_back(self, progress: Progress) -> Progress | None:
        """Weights, optimizer and totals of the last checkpoint; the data goes on. None without a checkpoint.

        Raises:
            DivergedError: too many rollbacks.
        """
        checkpoint = self.saver.newest()
        if checkpoint is None:
            self.log.event("no rollback", progress.step, "there is no checkpoint yet; going on")
            return None
        self.health.count_rollback(progress.step)
        state = self._put_back(checkpoint)
        self.log.rewind(state["step"])
        left_out = progress.step - state["step"]
        self.log.event(
            "rollback", progress.step, f"back to {checkpoint.name}; the samples of {left_out} steps are left out", to=state["step"]
        )
        return replace(Progress(**state["progress"]), data_step=progress.data_step, wall_s=progress.wall_s)

    def _put_back(self, checkpoint: Path) -> dict[str, Any]:
        state = load_checkpoint(checkpoint, self.engine, self.loaded.fingerprint)
        self.statistics.keep()
        return state

    def catch_up(self, step: int) -> None:
        """The evaluation before training, or one that its checkpoint was taken before."""
        if step == 0:
            self.evaluate(0, "before")
        elif self._owes_evaluation:
            known = [scores for scores in self.ranks.gather(self.log.evaluations())[0]["during"] if scores["step"] == step]
            if known:  # it was made, but the checkpoint does not know it
                self._know(step, {name: value for name, value in known[-1].items() if name != "step"})
            else:
                self.evaluate(step, "during")

    def save(self, progress: Progress) -> int:
        """Take a checkpoint; returns its step."""
        self.watchdog.beat("saving")
        self._watch_grace(progress)
        scores = self._scores[1] if self._scores and self._scores[0] == progress.step else None
        state = {
            "progress": vars(progress),
            "data": merge_states(self.ranks.gather(self.stream.state())),
            "health": self.health.state(),
            "loss_scale": self.scale.state(),
            "prompts": self.loaded.prompts.over_ranks(self.ranks),
            "patience": self.patience.state(),
            "scores": scores,
            "rng": {"rule": "seeded by (seed, data_step, rank) at each step", "seed": self.config.seed},
            "config_sha256": outcome.config_hash(self.config),
            "base_fingerprint": self.loaded.fingerprint,
            "inputs": self.loaded.described,
        }
        if scores is None and self.heldout and is_due(self.config.evaluation.every, progress.step) and progress.step < self.steps:
            state["owes"] = "evaluation"
        self.saver.save(self.engine, progress.step, state)
        return progress.step

    def evaluate(self, step: int, phase: str) -> bool:
        """Score the held-out samples, and keep the answers of before and after. False: the run is to stop, and nothing was kept."""
        if not self.heldout:
            return True
        watch = Watch(partial(self._tell_evaluation, phase), lambda: self.is_to_stop, lambda: self.stop.requested)
        try:
            evaluation = (evaluate_whole if phase == "after" else evaluate)(
                self.engine.module, self.stream.encoder, self.heldout, self.config.evaluation, self.ranks, watch
            )
        except EvaluationStopped:
            return False
        if self.ranks.is_first:
            for shard, key, reason in evaluation.refused:
                self.stream.quarantine.note({"__url__": shard, "__key__": key}, reason)
        if phase != "during" and self.ranks.is_first:
            outcome.write_answers(self.run, phase, evaluation.rows, evaluation.numbers, self.heldout)
        self.log.evaluation(step, phase, evaluation.scores)
        if phase == "during":
            self._know(step, evaluation.scores)
        return True

    def _tell_evaluation(self, phase: str, done: int, total: int) -> None:
        self.watchdog.beat("evaluating")
        self.log.progress(f"evaluating {phase} training", done, total)

    def _know(self, step: int, scores: dict[str, Any]) -> None:
        """The scores of an evaluation during training; a checkpoint of this step that was taken before gets them."""
        self._scores = step, scores
        self.patience.see(scores)
        self.saver.amend(step, {"scores": scores, "patience": self.patience.state(), "owes": None})
        self._end_early(step)

    def _watch_grace(self, progress: Progress) -> None:
        """Say once where a stop takes longer than the process may live."""
        step_s = progress.productive_s / max(1, progress.updates)
        if self.saver.save_s and step_s + self.saver.save_s > self.config.checkpoint.grace_s and not self._told_grace:
            self._told_grace = True
            self.log.event(
                "grace", progress.step,
                f"a stop takes about {step_s + self.saver.save_s:.0f} s (a step {step_s:.1f} s, a checkpoint {self.saver.save_s:.1f} s), "
                f"but checkpoint.grace_s is {self.config.checkpoint.grace_s:g}: killed by then, the run loses the steps since the last "
                "checkpoint. Give it more time after SIGTERM, or a smaller checkpoint.save_every",
            )  # fmt: skip

    def _end_early(self, step: int) -> None:
        if self.patience.is_over:
            self.steps = step
            self.log.event("early stop", step, f"{self.patience.metric} has not become better in {self.patience.since} evaluations")

    def finish(self, progress: Progress) -> dict[str, Any]:
        """Export the result and write summary.json; of an interrupted run only that."""
        self.saver.wait()
        if progress.step < self.steps or not self.evaluate(progress.step, "after"):
            return self._interrupted(replace(progress, wall_s=self.wall_s))
        outcome.export(without_secrets(self.config), self.run, self.engine, self.loaded, self.ranks, self.log)
        return self._finished(replace(progress, wall_s=self.wall_s))

    def _finished(self, progress: Progress) -> dict[str, Any]:
        run, log = self.run, self.log
        final = run.adapter if self.config.lora is not None else run.model
        summary = self._summary("finished", progress) | {"result": str(final), "quarantined": len(self.stream.quarantine)}
        if notes := summed(self.ranks.gather(self.stream.encoder.tally.to_dict())[:: self.ranks.sharing]):
            summary["notes"] = notes
        if self.ranks.is_first:
            write_json(run.summary, summary)
            log.summary(summary)
            for line in in_words(notes):
                log.say(f"data: {line}")
            if summary["quarantined"]:
                log.say(f"{summary['quarantined']} unusable samples were skipped; they are named in {run.quarantine}")
            if summary["skipped_steps"] or summary["rollbacks"]:
                log.say(f"{summary['skipped_steps']} steps were left out, {summary['rollbacks']} rollbacks; see {run.events}")
            log.say(f"finished {progress.step} steps in {progress.wall_s:.0f} s; result: {final}")
        self.ranks.barrier()
        return summary

    def _interrupted(self, progress: Progress) -> dict[str, Any]:
        name = signal.Signals(self.stop.signal or signal.SIGTERM).name  # none: another rank was told
        summary = self._summary("interrupted", progress) | {"signal": name}
        if self.ranks.is_first:
            write_json(self.run.summary, summary)
            self.log.summary(summary)
            self.log.say(f"interrupted by {name} {interrupted_in_words(progress.step, self.stop.seconds, self.config.checkpoint.grace_s)}")
        self.ranks.barrier()  # srun ends all ranks when one leaves with a code that is not 0: not before everything is written
        return summary

    def _summary(self, ended: str, progress: Progress) -> dict[str, Any]:
        totals = {**vars(progress), "skipped_steps": self.health.skipped, "rollbacks": self.health.rollbacks}
        lived = outcome.goodput(self.run, progress.productive_s)
        return {"ended": ended, **totals, "goodput": lived, "eval": self.log.evaluations()}
