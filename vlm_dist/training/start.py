"""A start of a run: the directory is held and mended, the configuration compared; it is claimed when training really goes on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlm_dist.checkpoints.form import find_checkpoints, read_state
from vlm_dist.config import Config
from vlm_dist.disk import cannot_begin, cannot_go_on, is_of_disk
from vlm_dist.distributed import Ranks
from vlm_dist.environment import write_environment
from vlm_dist.errors import ConfigError, MachineError, UserError, tell
from vlm_dist.run_dir import RunDir
from vlm_dist.run_lock import RunLock
from vlm_dist.run_mend import mend, put_aside
from vlm_dist.training import outcome

logger = logging.getLogger(__name__)


@dataclass
class Start:
    """One start of a run, whose directory this process and its fellows hold."""

    config: Config
    run: RunDir
    ranks: Ranks
    resume_anyway: bool
    goes_on: bool = False
    """All checks are passed: from now on the directory is this configuration's."""

    def claim(self) -> None:
        """Write config.yaml and environment.json. Call it on every rank when nothing is left to refuse."""
        self.goes_on = True
        if self.ranks.is_first:
            self.run.claim(self.config)
            write_environment(self.run, self.ranks)

    def record(self, reason: str) -> None:
        """The failure in summary.json; of a refused --resume-anyway nothing, so that the run stays as it was."""
        if (self.goes_on or not self.resume_anyway) and self.run.path.is_dir():
            outcome.record_failure(self.run, self.ranks, reason)


@contextmanager
def begin(config: Config, ranks: Ranks, *, resume_anyway: bool) -> Iterator[Start]:
    """Hold the run's directory. Every rank must enter it; what the first one meets all are told.

    Raises:
        ConfigError: another process trains there, or it holds a run of another configuration.
        MachineError: the directory cannot be made.
        CheckpointError: it is there and cannot be written, now or on the way.
    """
    run = RunDir(Path(config.output_dir) / config.name)
    lock, start = RunLock(run), Start(config, run, ranks, resume_anyway)
    try:
        _on_first(ranks, lambda: _open(start, lock))
        try:
            yield start
        except UserError as error:
            start.record(str(error))
            raise
        except OSError as error:
            if not is_of_disk(error, run.path):
                raise
            problem = cannot_go_on(run.path, error)
            start.record(str(problem))
            raise problem from error
    finally:
        _release(lock)


def _on_first(ranks: Ranks, action: Callable[[], object]) -> None:
    problem: UserError | None = None
    if ranks.is_first:
        try:
            action()
        except UserError as error:
            problem = error
    problem = ranks.gather(problem)[0]
    if problem is not None:
        raise problem


def _open(start: Start, lock: RunLock) -> None:
    run = start.run
    try:
        lock.acquire()
        mend(run, tell)
        for folder in (run.checkpoints, run.adapter, run.model, run.initial_model):
            _refuse_file(folder)
        _compare(start)
    except OSError as error:
        if not is_of_disk(error):
            raise
        raise cannot_begin(run.path, error) from error


def _compare(start: Start) -> None:
    """Refuse another run's directory; make ready one that no run has begun in.

    Raises:
        ConfigError: the run there is of another configuration.
    """
    run = start.run
    if not run.is_begun:
        run.quarantine.unlink(missing_ok=True)  # what an earlier start left that came to nothing
        shutil.rmtree(run.initial_model, ignore_errors=True)
        return
    if not run.config.exists() or start.resume_anyway:
        return
    try:
        changed = run.changed(start.config)
    except ConfigError as error:
        changed = _changed_by_hash(start, error)
    if changed:
        raise ConfigError(
            f"{run.path}: holds a run of another configuration ({'; '.join(changed)}); "
            "give this one another name (name=...), or continue it all the same with --resume-anyway"
        )


def _changed_by_hash(start: Start, problem: ConfigError) -> list[str]:
    """Where config.yaml is damaged, the newest checkpoint tells whether the configuration is the same."""
    run = start.run
    aside = put_aside(run.config)
    tell(f"{str(problem).splitlines()[0]}; it is damaged, is kept as {aside.name}, and is written anew")
    for path in find_checkpoints(run.checkpoints):
        try:
            same = read_state(path).get("config_sha256") == outcome.config_hash(start.config)
        except (OSError, ValueError, AttributeError):
            continue
        if not same:
            aside.replace(run.config)
        return [] if same else ["config.yaml is damaged, and the checkpoints are of other settings"]
    return []


def _refuse_file(folder: Path) -> None:
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise MachineError(f"{folder}: is a file or a link to nowhere, expected a folder; move it away, then run the same command again")


def _release(lock: RunLock) -> None:
    try:
        lock.release()
    except OSError as error:
        logger.warning("%s: cannot be given free (%s)", lock.path, error.strerror)
