"""A finished run -> a folder for use elsewhere."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm_dist import distributed
from vlm_dist.config_load import load_config
from vlm_dist.data.heldout import read_heldout
from vlm_dist.errors import ConfigError, DataError
from vlm_dist.models.export import Comparison, export_merged
from vlm_dist.models.merge import Onto
from vlm_dist.models.save import fresh_folder, put_in_place
from vlm_dist.models.trained import load_trained, trained_base
from vlm_dist.run_dir import RunDir
from vlm_dist.training.evaluate import question_of
from vlm_dist.training.prepare import open_quarantine


@dataclass(frozen=True)
class Exported:
    out: Path
    comparison: Comparison | None = None


def export_run(
    run_dir: Path, to: Literal["adapter", "merged-16bit"], out: Path | None = None, *, onto: Onto | None = None, samples: int = 8
) -> Exported:
    """Write the adapter, checked, or the merged model, compared with the trained one on the run's held-out samples.

    Args:
        out: a folder that does not exist yet; None: below the run directory, replaced if it is there.

    Raises:
        ConfigError: no run, a run without adapter, or `out` is taken.
        ModelError: the run is not finished, or its adapter does not fit.
    """
    run = RunDir(run_dir)
    if not run.config.exists():
        raise ConfigError(f"{run_dir}: no run directory (no config.yaml in it); give one such as runs/quickstart")
    config = load_config(run.config)
    if config.lora is None:
        raise ConfigError(f"{run_dir}: trained every weight, so there is nothing to merge; its model is {run.model}")
    if out is not None and out.exists():
        raise ConfigError(f"--out: '{out}' exists already; give a new folder")
    out = out or run.path / "export" / to
    ranks = distributed.start()
    model, processor = load_trained(str(run_dir), ranks.device)  # checks the adapter against its record
    if to == "adapter":
        temporary = fresh_folder(out)
        shutil.copytree(run.adapter, temporary, dirs_exist_ok=True)
        put_in_place(temporary, out)
        return Exported(out)
    try:
        heldout = read_heldout(config.data, samples, open_quarantine(config, run))
    except DataError:
        heldout = []  # the shards are gone: the probe's pictures serve instead
    cases = [(question_of(sample), sample.images) for sample in heldout] or None
    base = trained_base(run)
    return Exported(out, export_merged(model, processor, base, out, adapter=run.adapter, onto=onto, cases=cases))
