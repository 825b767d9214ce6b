"""The name of every file that a run writes, and opening a run anew or to continue it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.config import Config
from vlm_dist.config_load import differences, dump_config, load_config
from vlm_dist.errors import ConfigError

# What changes the numbers that a run computes. The other sections may change between two starts of the same run.
DECISIVE_SECTIONS = ("seed", "model", "lora", "data", "optim", "training", "engine")
# What they hold besides: how the work is cut and placed (the parity tests show that no number depends on it).
HARMLESS = (
    "engine.zero_stage",
    "engine.offload",
    "engine.nvme_path",
    "training.micro_batch",
    "model.gradient_checkpointing",
    "data.prefetch",
    "data.workers",
    "data.cache_dir",
    "data.cache_gb",
    "data.cache_whole",
)


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

    def read_summary(self) -> dict[str, Any] | None:
        return read_json(self.summary)

    @classmethod
    def open(cls, config: Config, *, resume_anyway: bool = False, write: bool = True) -> RunDir:
        """The directory of this run, made or continued. Only one rank should `write`.

        Raises:
            ConfigError: the directory holds a run whose numbers another configuration decided.
        """
        run = cls(Path(config.output_dir) / config.name)
        if run.config.exists() and not resume_anyway:
            changed = differences(load_config(run.config), config, DECISIVE_SECTIONS, HARMLESS)
            if changed:
                raise ConfigError(
                    f"{run.path}: holds a run of another configuration ({'; '.join(changed)}); "
                    "give this one another name (name=...), or continue it all the same with --resume-anyway"
                )
        if write:
            run.log(0).parent.mkdir(parents=True, exist_ok=True)
            write_text(run.config, dump_config(config))
        return run


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
