"""Scores of a finished run on any held-out shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_dist import distributed
from vlm_dist.config_load import load_config
from vlm_dist.data.encode import Encoder
from vlm_dist.data.heldout import read_heldout
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.errors import ConfigError, DataError
from vlm_dist.models.trained import load_trained
from vlm_dist.run_dir import RunDir
from vlm_dist.scoring.evaluate import evaluate


def score_run(run_dir: str, *, data: list[str] | None = None, samples: int | None = None, base: bool = False) -> dict[str, Any]:
    """Generate answers and compare them with the truth, as training does.

    Args:
        data: shards; None: the run's own data.heldout.
        samples: how many, spread evenly; None: all.
        base: leave the run's adapter off.
    """
    run = RunDir(Path(run_dir))
    if not run.config.exists():
        raise ConfigError(f"{run_dir}: no run directory (no config.yaml in it); give one such as runs/quickstart")
    config = load_config(run.config)
    if data is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"heldout": data})})
    ranks = distributed.start()
    quarantine = Quarantine(run.quarantine, config.data.max_bad_fraction)
    heldout = read_heldout(config.data, samples, quarantine)
    if not heldout:
        raise DataError("no held-out sample to score; name shards with --data")
    model, processor = load_trained(run_dir, ranks.device, base=base)
    found = evaluate(model, Encoder.of(processor, config.data), heldout, config.evaluation, ranks)
    for shard, key, reason in found.refused:
        quarantine.note({"__url__": shard, "__key__": key}, reason)
    if not found.rows:
        _, key, reason = found.refused[0]
        raise DataError(f"none of the {len(heldout)} held-out samples can be asked; the first ({key}): {reason}")
    return found.scores
