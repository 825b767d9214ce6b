"""The errors that a user sees: one line that says where, what was found, what was expected, and what to do."""

import sys


class UserError(ValueError):
    """Something outside the program is wrong. The command line prints it as one line and exits with `exit_code`."""

    exit_code = 2
    told = False
    """Another rank says it: this one only ends."""
    of_one = False
    """One rank says it, and the others know."""


class ConfigError(UserError):
    """The YAML, or an override on the command line, is wrong."""


class DataError(UserError):
    """Shards or samples are missing, unreadable or unusable."""

    exit_code = 3


class ModelError(UserError):
    """The model cannot be found, loaded or adapted."""

    exit_code = 4


class CheckpointError(UserError):
    """A checkpoint cannot be written or read."""

    exit_code = 5


class BadSample(Exception):
    """This one sample cannot be used; the message says why. It is skipped, counted and named in quarantine.jsonl."""


class MachineError(UserError):
    """This machine cannot do what the configuration asks."""

    exit_code = 6


def words_of(error: Exception) -> str:
    """What a library said, on one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def tell(text: str) -> None:
    """What is said beside a run's log, on standard output."""
    print(f"vlm-dist: {text}", flush=True)


def warn(text: str) -> None:
    """The same on standard error."""
    print(f"vlm-dist: {text}", file=sys.stderr, flush=True)
