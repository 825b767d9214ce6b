"""The name of every file that a run writes, and how they are read and written."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.config import Config
from vlm_dist.config_load import differences, dump_config, load_config
from vlm_dist.redaction import redacted_tree

logger = logging.getLogger(__name__)
# What changes the numbers that a run computes. The other sections may change between two starts of the same run.
DECISIVE_SECTIONS = ("seed", "model", "lora", "data", "optim", "training", "engine")
# What they hold besides: how the work is cut and placed (the parity tests show that no number depends on it).
HARMLESS = (
    "engine.zero_stage",
    "engine.offload",
    "engine.nvme_path",
    "engine.sequence_parallel",
    "training.micro_batch",
    "model.gradient_checkpointing",
    "data.prefetch",
    "data.workers",
    "data.processes",
    "data.cache_dir",
    "data.cache_gb",
    "data.cache_whole",
    "data.cache_features",
    "data.features_gb",
)


PRIVATE = 0o600  # for the owner alone: what tells of machines and addresses


@dataclass(frozen=True)
class RunDir:
    """`OUTPUT_DIR/NAME`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What happened besides steps: skipped steps, spikes, rollbacks, slow ranks, starts; one JSON a line."""
        return self.path / "events.jsonl"

    @property
    def starts(self) -> Path:
        """When each earlier start of this run began and when it was last alive; one JSON a line."""
        return self.path / "logs" / "starts.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine.jsonl"

    @property
    def tracking(self) -> Path:
        """The ids under which trackers (Weights & Biases, MLflow) know this run."""
        return self.path / "tracking.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The final PEFT adapter and processor (runs with lora)."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The final model and processor (runs that train the weights themselves)."""
        return self.path / "model"

    @property
    def initial_model(self) -> Path:
        """The random start of a run with model.scratch."""
        return self.path / "initial_model"

    def log(self, rank: int) -> Path:
        return self.path / "logs" / f"rank-{rank}.log"

    def beat(self, rank: int) -> Path:
        """Rewritten every few seconds while the rank lives."""
        return self.path / "logs" / f"rank-{rank}.alive.json"

    def stacks(self, rank: int) -> Path:
        """What a rank was doing when the run hung."""
        return self.path / "logs" / f"rank-{rank}.stacks.txt"

    @property
    def lock(self) -> Path:
        """Who trains in this directory; see `run_lock`."""
        return self.path / "logs" / "lock.json"

    def read_summary(self) -> dict[str, Any] | None:
        """summary.json; None where there is none, or none that can be understood."""
        found = read_json(self.summary)
        if not isinstance(found, dict) or not isinstance(found.get("ended"), str):
            return None
        whole = isinstance(found.get("result"), str) and isinstance(found.get("step"), int)
        return found if whole or found["ended"] != "finished" else None

    @property
    def is_begun(self) -> bool:
        """Whether a run has made a step here, or left a checkpoint or a result: only then its configuration decides."""
        results = (self.checkpoints, self.adapter, self.model)
        left = any(path.is_dir() and any(not part.name.startswith(".") for part in path.iterdir()) for path in results)
        return left or any("loss" in row for row in read_jsonl(self.metrics))

    def changed(self, config: Config) -> list[str]:
        """`key: old -> new` of what decides numbers and is not as the run here was begun; secrets are left out of both.

        Raises:
            ConfigError: config.yaml cannot be understood.
        """
        return differences(load_config(self.config), config, DECISIVE_SECTIONS, HARMLESS)

    def claim(self, config: Config) -> None:
        """From now on this is the run of this configuration, of which config.yaml keeps all but secrets."""
        write_text(self.config, dump_config(config), mode=PRIVATE)


def write_text(path: Path, text: str, *, mode: int | None = None) -> None:
    """Write a small file whole or not at all.

    Args:
        mode: who may read it; None: as the user's umask says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    if mode is not None:
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Any, *, mode: int | None = None) -> None:
    """Write JSON whole or not at all, secrets left out."""
    write_text(path, json.dumps(redacted_tree(value), indent=1, ensure_ascii=False) + "\n", mode=mode)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """One more line of a JSON-lines file, secrets left out."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(redacted_tree(row)) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or where it holds none (then a line says so)."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s: cannot be read (%s); passed over", path, error.strerror)
        return None
    found = json_row(content)
    if found is None:
        logger.warning("%s: is damaged (no JSON); passed over", path)
    return found


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file. A last line cut off by a crash is left out; so is any other that cannot be read, which is told."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("%s: cannot be read (%s); passed over", path, error.strerror)
        return []
    *lines, last = content.split(b"\n")
    rows = [json_row(line) for line in lines]
    bad = [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]
    if bad:
        logger.warning("%s: line %s cannot be read and is left out", path, ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else ""))
    return [row for row in [*rows, json_row(last)] if isinstance(row, dict)]


def json_row(line: bytes) -> Any:
    """What a line of JSON holds; None where it cannot be read."""
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
