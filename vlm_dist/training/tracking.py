"""Trackers beside the run's own files: Weights & Biases, TensorBoard, MLflow. They never block, never end a run, and are sent no secret.

All get the same: every number of metrics.jsonl under its name (of a nested one PART/NAME, of an evaluation eval/NAME, a curve from before
to after training), the numbers of summary.json at the end, and the held-out pictures with their answers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm_dist.config import Config
from vlm_dist.redaction import redacted
from vlm_dist.run_dir import RunDir, read_jsonl
from vlm_dist.training.tracker import COLUMNS, Tracker

logger = logging.getLogger(__name__)
MOST_PICTURES = 64


class Trackers:
    """Those that `log.trackers` names; one that fails is told once, and training goes on without it."""

    def __init__(self, config: Config, run: RunDir):
        self.run = run
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(config.log.trackers):
            with self._guarded(name):
                tracker = _open(name, config, run)
                if tracker is not None:
                    self._open[name] = tracker

    def log(self, row: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        numbers = numbers_of(row["eval"], "eval/") if "eval" in row else numbers_of(row)
        numbers.pop("step", None)
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.log(row["step"], numbers)

    def finish(self, summary: dict[str, Any]) -> None:
        """What summary.json holds, and the answers of samples/."""
        numbers = numbers_of({key: value for key, value in summary.items() if key != "eval"}, "summary/")
        for phase in ("before", "after"):
            numbers |= numbers_of((summary.get("eval") or {}).get(phase) or {}, f"summary/{phase}/")
        result = Path(summary["result"]) if "result" in summary else None
        rows = answers_of(self.run) if result is not None else []  # an interrupted run has no time for them
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                if rows:
                    tracker.pictures(rows)
                tracker.finish(numbers, result)

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.close()

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises must not end a training run
            self._open.pop(name, None)
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("%s failed (%s); training goes on without it", TITLES[name], redacted(words))


TITLES = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard", "mlflow": "MLflow"}


def _open(name: str, config: Config, run: RunDir) -> Tracker | None:
    if name == "wandb":
        from vlm_dist.training.track_wandb import Wandb, wandb_mode

        mode = wandb_mode(config)
        return None if mode == "disabled" else Wandb(config, run, mode)
    from vlm_dist.training.track_files import Mlflow, TensorBoard

    return TensorBoard(run) if name == "tensorboard" else Mlflow(config, run)


def numbers_of(row: dict[str, Any], before: str = "") -> dict[str, float]:
    """The numbers of a row, of nested ones too, by names like imbalance/tokens."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= numbers_of(value, f"{before}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{before}{key}"] = value
    return found


def answers_of(run: RunDir) -> list[dict[str, Any]]:
    """The first held-out samples with their answers before and after."""
    before, after = (
        {(row.get("number"), row["key"]): row for row in read_jsonl(run.samples / f"{phase}.jsonl")} for phase in ("before", "after")
    )
    rows = []
    for place, row in list((after or before).items())[:MOST_PICTURES]:
        first, last = before.get(place, {}), after.get(place, {})
        picture = run.samples / row["thumbnail"] if row.get("thumbnail") else None
        values = (row["prompt"], first.get("answer"), last.get("answer"), row["truth"], first.get("exact"), last.get("exact"),
                  last.get("without_picture", {}).get("answer"))  # fmt: skip
        shown = [redacted(value) if isinstance(value, str) else value for value in values]
        rows.append({"picture": picture if picture and picture.exists() else None, **dict(zip(COLUMNS, shown, strict=True))})
    return rows
