"""Scores of a finished run, an adapter or a checkpoint on any held-out shards."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from vlm_dist import distributed
from vlm_dist.config import DataConfig, EvaluationConfig, VideoConfig
from vlm_dist.config_load import load_config, refuse_without_secrets
from vlm_dist.data.encode import Encoder
from vlm_dist.data.heldout import read_heldout
from vlm_dist.data.quarantine_redacted import RedactedQuarantine
from vlm_dist.errors import ConfigError, DataError
from vlm_dist.models.adapters import is_adapter, run_of
from vlm_dist.models.source import looks_like_path
from vlm_dist.models.trained import load_trained
from vlm_dist.run_dir import RunDir
from vlm_dist.scoring.without_pictures import evaluate_whole


def score_run(
    source: str,
    *,
    data: list[str] | None = None,
    samples: int | None = None,
    base: bool = False,
    base_model: str | None = None,
    without_pictures: bool | None = None,
) -> dict[str, Any]:
    """Generate answers and compare them with the truth, as training does.

    Args:
        source: a run directory; or an adapter folder, a checkpoint folder or a hub id, which are scored with the default settings.
        data: shards; None: the run's own data.heldout.
        samples: how many, spread evenly; None: all.
        base: leave the adapter off.
        base_model: where the adapter's base is now, if not where its files say.
        without_pictures: ask with greyed pictures too; None: as the run's settings say.

    Raises:
        ConfigError: no run, and no shards to score on.
        DataError: there is no held-out sample.
        ModelError: the model cannot be loaded.
    """
    run = RunDir(Path(source))
    if not run.config.exists():
        run = run_of(Path(source)) or run
    settings, evaluation = _settings(run, source, data)
    if without_pictures is not None:
        evaluation = evaluation.model_copy(update={"without_pictures": without_pictures})
    ranks = distributed.start()
    with tempfile.TemporaryDirectory() as folder:  # unusable samples are named in the run's own list, if there is a run
        listed = run.quarantine if run.config.exists() else Path(folder) / run.quarantine.name
        quarantine = RedactedQuarantine(listed, settings.max_bad_fraction)
        heldout = read_heldout(settings, samples, quarantine)
        if not heldout:
            raise DataError("no held-out sample to score; name shards with --data")
        model, processor = load_trained(source, ranks.device, base=base, base_model=base_model)
        found = evaluate_whole(model, Encoder.of(processor, settings), heldout, evaluation, ranks)
        for shard, key, reason in found.refused:
            quarantine.note({"__url__": shard, "__key__": key}, reason)
    distributed.stop_at_exit()
    if not found.rows:
        _, key, reason = found.refused[0]
        raise DataError(f"none of the {len(heldout)} held-out samples can be asked; the first ({key}): {reason}")
    return found.scores


def _settings(run: RunDir, source: str, data: list[str] | None) -> tuple[DataConfig, EvaluationConfig]:
    """Those of the run, or the default ones."""
    if run.config.exists():
        config = load_config(run.config)
        if data is None:
            refuse_without_secrets(config, ("data.heldout",))
        return config.data if data is None else config.data.model_copy(update={"heldout": data}), config.evaluation
    if looks_like_path(source) and not is_adapter(run.path) and not (run.path / "config.json").exists():
        raise ConfigError(
            f"{source}: no run directory (no config.yaml in it), no adapter and no checkpoint; give one such as runs/quickstart"
        )
    if data is None:
        raise ConfigError(f"{source}: is no run, so it names no held-out shards; give some with --data")
    return DataConfig(train=data, heldout=data, max_seq_length=2**31, video=VideoConfig()), EvaluationConfig()
