"""What a run tells while it runs: metrics.jsonl, a progress bar on a terminal (plain lines elsewhere), W&B, the rank's log file."""

from __future__ import annotations

import errno
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.config import Config
from vlm_dist.distributed import Ranks
from vlm_dist.redaction import RedactRecords, redacted
from vlm_dist.run_dir import RunDir, append_row, read_jsonl, write_text
from vlm_dist.scoring.without_pictures import without_pictures_in_words
from vlm_dist.training.tracking import Trackers

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
OF_EVERY_SCORE = ("exact_match", "samples", "by_kind", "without_pictures")


class Log:
    """Speaks for the first rank, and keeps every rank's log file. Use it as a context."""

    def __init__(self, run: RunDir, config: Config, ranks: Ranks, steps: int):
        self.run, self.config, self.ranks, self.steps = run, config, ranks, steps
        self._trackers: Trackers | None = None
        self._bar = self._task = None
        self._lasting = ("", 0.0, 0.0)
        self._file = logging.FileHandler(_made(run.log(ranks.rank)), encoding="utf-8")
        self._folder = _identity(run.path)
        self._screen = logging.StreamHandler(sys.stdout)
        for handler in (self._file, self._screen):
            handler.addFilter(RedactRecords())

    def __enter__(self) -> Log:
        ours = logging.getLogger("vlm_dist")
        ours.setLevel(logging.INFO)
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        ours.addHandler(self._file)
        if self.ranks.is_first:
            if sys.stdout.isatty():
                self._start_bar()
            else:
                ours.addHandler(self._screen)
            self._trackers = Trackers(self.config, self.run)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._trackers is not None:
            self._trackers.close()
        for handler in (self._file, self._screen):
            logging.getLogger("vlm_dist").removeHandler(handler)

    def say(self, text: str) -> None:
        """One line for people: on the first rank's screen and in its log file."""
        if self._bar is not None:
            self._bar.console.print(redacted(text), highlight=False, markup=False, soft_wrap=True)
            self._file.handle(logger.makeRecord(logger.name, logging.INFO, "", 0, text, (), None))
        else:
            logger.info(text)

    def event(self, kind: str, step: int, text: str, *, quiet: bool = False, **details: Any) -> None:
        """Something besides a step: a line for people, unless `quiet`, and one in events.jsonl."""
        if self.ranks.is_first:
            if not quiet:
                self.say(f"step {step}: {kind}: {text}")
            row = {"time": round(time.time(), 3), "step": step, "event": kind, "text": text, **details}
            append_row(self.run.events, row)

    def rewind(self, step: int, *, events: bool = False) -> None:
        """Forget the lines after `step`: steps that were done after the checkpoint from which the run continues.

        Args:
            events: those of these steps too, when they are done again. (After a rollback they have happened.)
        """
        if not self.ranks.is_first:
            return
        if self.run.metrics.exists() or step > 0:
            kept = [row for row in read_jsonl(self.run.metrics) if row["step"] <= step]
            write_text(self.run.metrics, "".join(json.dumps(row) + "\n" for row in kept))
            if lost := missing({row["step"] for row in kept if "loss" in row}, step):
                self.say(f"{self.run.metrics}: the lines of {lost} are lost; curves have a gap there")
        if events and self.run.events.exists():
            left = events_until(read_jsonl(self.run.events), step)
            write_text(self.run.events, "".join(json.dumps(row) + "\n" for row in left))

    def step(self, metrics: dict[str, Any]) -> None:
        """One optimizer step's numbers."""
        if not self.ranks.is_first:
            return
        self._write(metrics)
        loss = "none" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
        line = f"loss {loss}  lr {metrics['lr']:.2e}  {metrics['samples_per_s']:.1f} samples/s  {metrics['tokens_per_s']:,.0f} tokens/s"
        if any(uneven := metrics["imbalance"].values()):
            line += "  uneven " + "/".join(f"{excess:.0%}" for excess in uneven)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=metrics["step"], numbers=line)
        elif metrics["step"] % self.config.log.every == 0 or metrics["step"] == self.steps:
            left = _clock((self.steps - metrics["step"]) * metrics["step_s"])
            logger.info("step %d/%d  %s  %s left", metrics["step"], self.steps, line, left)

    def progress(self, what: str, done: int, total: int) -> None:
        """How far something is that takes long: a line every ten seconds, the first after two; on a terminal beside the bar."""
        now = time.monotonic()
        if what != self._lasting[0] or done == 0:
            self._lasting = (what, now, now + 2)
        _, began, due = self._lasting
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, numbers=f"{what}: {done} of {total} samples")
        elif self.ranks.is_first and done and now >= due:
            self._lasting = (what, began, now + 10)
            logger.info("%s: %d of %d samples  %s left", what, done, total, _clock((now - began) / done * (total - done)))

    def evaluation(self, step: int, phase: str, scores: dict[str, Any]) -> None:
        """Scores on held-out samples; phase is before, during or after."""
        if not self.ranks.is_first:
            return
        self._write({"step": step, "phase": phase, "eval": scores})
        more = "".join(f"{name} {score:.3f}  " for name, score in scores.items() if name not in OF_EVERY_SCORE)
        kinds = "  ".join(f"{kind} {share:.0%}" for kind, share in scores["by_kind"].items())
        when = f"{phase} training (step {step})"
        self.say(f"held-out exact match {when}: {scores['exact_match']:.1%} of {scores['samples']} samples  {more}{kinds}")
        if (blind := scores.get("without_pictures")) is not None:
            self.say(without_pictures_in_words(blind))

    def summary(self, summary: dict[str, Any]) -> None:
        """summary.json, for the trackers."""
        if self._trackers is not None:
            self._trackers.finish(summary)

    def evaluations(self) -> dict[str, Any]:
        """The scores so far, also those of earlier starts of this run: {"before", "during": [...], "after"}."""
        found: dict[str, Any] = {"before": None, "during": [], "after": None}
        for row in read_jsonl(self.run.metrics):
            if "eval" in row:
                scores = {"step": row["step"], **row["eval"]}
                if row["phase"] == "during":
                    found["during"].append(scores)
                else:
                    found[row["phase"]] = scores
        return found

    def _write(self, row: dict[str, Any]) -> None:
        self._see_folder()
        append_row(self.run.metrics, row)
        if self._trackers is not None:
            self._trackers.log(row)

    def _see_folder(self) -> None:
        """What is written into a folder that took the place of the run's (deleted, unmounted) would be lost, or fill another disk."""
        if _identity(self.run.path) != self._folder:
            raise FileNotFoundError(errno.ENOENT, "it is not the folder any more in which the run began", str(self.run.path))

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.table import Column

        numbers = TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=False, ratio=1))  # a narrow window breaks the line
        self._bar = Progress(
            TextColumn(self.config.name), BarColumn(bar_width=20), MofNCompleteColumn(), numbers, TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=self.steps, numbers="")
        self._bar.start()


class StepTimer:
    """Seconds of the current step, how many of them were spent waiting for data, and how many this rank worked on its own: reading and
    the forward pass, in which it waits for no other rank (at ZeRO stage 3 it does)."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.begin()

    def begin(self) -> None:
        self._start = time.perf_counter()
        self.data_wait_s = 0.0
        self._forward: list[tuple[Any, Any]] = []

    def data_arrived(self) -> None:
        self.data_wait_s = time.perf_counter() - self._start

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around each forward pass."""
        begin = self._now()
        yield
        self._forward.append((begin, self._now()))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def busy_s(self) -> float:
        """Seconds that this rank waited for data or computed forward passes. On a GPU all of them must have ended."""
        if self._on_gpu:
            return self.data_wait_s + sum(begin.elapsed_time(end) for begin, end in self._forward) / 1000
        return self.data_wait_s + sum(end - begin for begin, end in self._forward)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def missing(steps: set[int], last: int) -> str:
    """Which of the steps 1 to `last` are not among these, in words; empty if none is."""
    gone = [step for step in range(1, last + 1) if step not in steps]
    if not gone:
        return ""
    span = f"step {gone[0]}" if len(gone) == 1 else f"{len(gone)} steps between {gone[0]} and {gone[-1]}"
    return span if len(gone) == 1 or len(gone) < gone[-1] - gone[0] + 1 else f"steps {gone[0]} to {gone[-1]}"


def events_until(rows: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The events that have happened for a run that continues from the checkpoint of `step`: what was told before a rollback that this
    checkpoint knows of stays, whatever its step; of the rest what belongs to later steps goes, for they are done again."""
    saves = [place for place, row in enumerate(rows) if row["event"] == "checkpoint" and row["step"] == step]
    known = rows[: saves[-1]] if saves else []
    rollbacks = [place for place, row in enumerate(known) if row["event"] == "rollback"]
    settled = rollbacks[-1] + 1 if rollbacks else 0
    return rows[:settled] + [row for row in rows[settled:] if row["step"] <= step]


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
