"""Weights & Biases, kept at arm's length: it never blocks, never kills a run, and is sent no secret."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from vlm_dist.config import Config
from vlm_dist.redaction import redacted_tree

logger = logging.getLogger(__name__)


def wandb_mode(config: Config) -> str:
    """The mode that `log.wandb` means here: auto is online where an API key is set, else disabled."""
    if config.log.wandb != "auto":
        return config.log.wandb
    return "online" if os.environ.get("WANDB_API_KEY") else "disabled"


class Tracker:
    """One W&B run; a failure is logged once, and training goes on without it."""

    def __init__(self, config: Config, folder: Path):
        self._run = None
        mode = wandb_mode(config)
        if mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            self._run = wandb.init(
                project=config.log.wandb_project,
                name=config.name,
                id=config.name,
                resume="allow",
                mode=mode,  # pyright: ignore[reportArgumentType]
                dir=str(folder),
                config=redacted_tree(config.model_dump(mode="json")),
                settings=wandb.Settings(init_timeout=30, x_disable_meta=True, console="off"),
            )
        except Exception as error:  # whatever W&B raises must not end a training run
            self._give_up(error)

    def log(self, row: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            values = {f"eval/{row['phase']}_exact_match": row["eval"]["exact_match"]} if "eval" in row else row
            self._run.log({key: value for key, value in values.items() if key != "step"}, step=row["step"])
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        logger.warning(
            "Weights & Biases failed (%s); training goes on without it", str(error).splitlines()[0] if str(error) else type(error).__name__
        )
