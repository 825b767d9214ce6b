"""Weights & Biases."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from vlm_dist.config import Config
from vlm_dist.redaction import redacted_tree
from vlm_dist.run_dir import RunDir, read_json, write_json
from vlm_dist.training.tracker import COLUMNS


def wandb_mode(config: Config) -> str:
    """The mode that `log.wandb` means here: auto is online where an API key is set, else disabled."""
    if config.log.wandb != "auto":
        return config.log.wandb
    return "online" if os.environ.get("WANDB_API_KEY") else "disabled"


class Wandb:
    """A W&B run for a run directory, whatever the names: its id is drawn once and kept there, so that each start of this run goes on with
    it, and another run of the same name does not."""

    def __init__(self, config: Config, run: RunDir, mode: str):
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        log = config.log
        known = read_json(run.tracking) or {}
        started = known.get("wandb", {}).get("starts", 0)
        self._wandb, self._artifacts, self._dir = wandb, log.wandb_artifacts, run
        number = known.get("wandb", {}).get("id") or secrets.token_hex(8)
        self._run: Any = wandb.init(
            project=log.wandb_project,
            entity=log.wandb_entity,
            group=log.wandb_group,
            tags=log.wandb_tags or None,
            job_type="train" if not started else "resume",
            name=config.name,
            id=number,
            resume="allow",
            mode=mode,  # pyright: ignore[reportArgumentType]
            dir=str(run.path),
            config=redacted_tree(config.model_dump(mode="json")),
            settings=wandb.Settings(init_timeout=30, x_disable_meta=True, console="off"),
        )
        write_json(run.tracking, {**known, "wandb": {"id": number, "starts": started + 1}})
        self._run.define_metric("step")  # steps that a restart does again come a second time, and W&B's own count only goes up
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({**numbers, "step": step})

    def pictures(self, rows: list[dict[str, Any]]) -> None:
        table = self._wandb.Table(columns=["picture", *COLUMNS])
        for row in rows:
            picture = self._wandb.Image(str(row["picture"])) if row["picture"] else None
            table.add_data(picture, *(row[name] for name in COLUMNS))
        self._run.log({"held-out answers": table})

    def finish(self, numbers: dict[str, float], result: Path | None) -> None:
        self._run.summary.update(numbers)
        folders = {"result": result, "samples": self._dir.samples}
        for kind in self._artifacts:
            folder = folders[kind]
            if folder is not None and folder.exists():
                artifact = self._wandb.Artifact(f"{self._run.id}-{kind}", type="model" if kind == "result" else "answers")
                artifact.add_dir(str(folder))
                self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()
