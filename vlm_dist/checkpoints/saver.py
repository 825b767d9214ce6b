"""Saves checkpoints beside the training: a copy in memory is all that training waits for, a thread of rank 0 writes it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vlm_dist.checkpoints import mirror
from vlm_dist.checkpoints.form import amend_state, newest_good_checkpoint, prune, write_checkpoint
from vlm_dist.checkpoints.snapshot import Snapshot, take_snapshot
from vlm_dist.config import Config
from vlm_dist.distributed import Ranks
from vlm_dist.errors import CheckpointError, UserError
from vlm_dist.launched import note_saved
from vlm_dist.run_dir import RunDir


class Saver:
    """Use it as a context: leaving it waits for the last checkpoint.

    Args:
        tell: takes (kind, step, text, quiet=..., **details): an event of the run.
        lower_is_better: so it is with checkpoint.best_metric.
    """

    def __init__(self, run: RunDir, config: Config, ranks: Ranks, tell: Callable[..., object], *, lower_is_better: bool = False):
        self.run, self.config, self.ranks, self.tell, self.lower_is_better = run, config.checkpoint, ranks, tell, lower_is_better
        self._of_run = config
        self.mirror = mirror.place_of(self.config.mirror, run) if self.config.mirror else None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self.save_s = 0.0
        """What the last save took, until it was on the disk; of the first rank."""

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        self._writer.shutdown()
        if kind is None:
            self.wait()

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Every rank must call it.

        Raises:
            CheckpointError: this one, or the one before it, cannot be written. The earlier ones are untouched.
        """
        start = time.perf_counter()
        self.wait()
        snapshot = take_snapshot(engine, keep=self.ranks.is_first)
        if snapshot is not None:
            stall_s = time.perf_counter() - start
            self._pending = self._writer.submit(self._write, snapshot, step, state, stall_s)
            if not self.config.write_async:
                self.wait()

    def amend(self, step: int, changes: dict[str, Any]) -> None:
        """Add to the state of the checkpoint of this step what was learnt since it was taken. The first rank does it.

        Raises:
            CheckpointError: that checkpoint cannot be written.
        """
        self.wait()
        path = self.run.checkpoints / f"step-{step:08d}"
        if self.ranks.is_first and path.exists():
            self._pending = self._writer.submit(self._amend, path, step, changes)

    def wait(self) -> None:
        """Until the checkpoint that is being written is there.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def newest(self, *, insist: bool = False) -> Path | None:
        """The newest whole checkpoint, the same for every rank; fetched from the mirror where there is none here.

        Args:
            insist: though the mirror's are of a run of another configuration.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged; or those of the mirror are of another run.
        """
        found: Path | UserError | None = None
        if self.ranks.is_first:
            try:
                self.wait()
                found = newest_good_checkpoint(self.run.checkpoints)
                if self.mirror:
                    found = self._of_mirror(self.mirror, found, insist)
            except UserError as error:
                found = error
        found = self.ranks.gather(found)[0]
        if isinstance(found, UserError):
            raise found
        return found

    def _of_mirror(self, url: str, here: Path | None, insist: bool) -> Path | None:
        """The checkpoint that is here, or the mirror's."""
        try:
            mirror.check(url, self._of_run, insist=insist)
        except CheckpointError as error:
            if here is None:
                raise
            self.tell("mirror failed", 0, str(error))  # the run has its own
        return here or mirror.fetch_newest(url, self.run.checkpoints)

    def _prune(self) -> list[Path]:
        config = self.config
        return prune(self.run.checkpoints, config.keep_last, config.keep_best, config.best_metric, lower_is_better=self.lower_is_better)

    def _write(self, snapshot: Snapshot, step: int, state: dict[str, Any], stall_s: float) -> None:
        start = time.perf_counter()
        path = write_checkpoint(self.run.checkpoints, step, snapshot, state)
        note_saved()
        gone = self._prune()
        if self.mirror:
            try:
                mirror.send(path, self.mirror, self._of_run, gone)
            except CheckpointError as error:  # the run has its own; the next one is sent again
                self.tell("mirror failed", step, str(error))
        self.save_s = stall_s + time.perf_counter() - start
        seconds = {"stall_s": round(stall_s, 4), "write_s": round(time.perf_counter() - start, 4)}
        self.tell("checkpoint", step, path.name, quiet=True, **seconds)

    def _amend(self, path: Path, step: int, changes: dict[str, Any]) -> None:
        def send(file: Path) -> None:
            if self.mirror:
                try:
                    mirror.send_file(file, self.mirror)
                except CheckpointError as error:
                    self.tell("mirror failed", step, str(error))

        amend_state(path, changes, send)
        note_saved()
