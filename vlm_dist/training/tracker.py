"""What a tracker is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

COLUMNS = ("question", "answer before", "answer after", "truth", "exact before", "exact after", "answer without the picture")


class Tracker(Protocol):
    """One of them, for one start of a run."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """The numbers of a step or an evaluation."""
        ...

    def pictures(self, rows: list[dict[str, Any]]) -> None:
        """Held-out samples: `picture` (a file, or None) and `COLUMNS`."""
        ...

    def finish(self, numbers: dict[str, float], result: Path | None) -> None:
        """The numbers of the summary, and where the adapter or model is, if the run came to its end."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...
