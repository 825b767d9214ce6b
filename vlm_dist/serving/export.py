"""A finished run -> a folder for use elsewhere."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_dist import distributed
from vlm_dist.config import Config
from vlm_dist.config_load import load_config
from vlm_dist.data.heldout import read_heldout
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.errors import ConfigError, DataError, ModelError
from vlm_dist.models.card import Example, model_card
from vlm_dist.models.export import Comparison, export_merged
from vlm_dist.models.introspect import family_of
from vlm_dist.models.merge import Onto
from vlm_dist.models.save import fresh_folder, put_in_place
from vlm_dist.models.trained import load_trained, trained_base
from vlm_dist.run_dir import RunDir, read_jsonl
from vlm_dist.scoring.evaluate import question_of

SHOWN = 6  # held-out answers in the README


@dataclass(frozen=True)
class Exported:
    out: Path
    comparison: Comparison | None = None
    warning: str = ""
    """What others will not do with it."""


def export_run(
    run_dir: Path, to: Literal["adapter", "merged-16bit"], out: Path | None = None, *, onto: Onto | None = None, samples: int = 8
) -> Exported:
    """Write the adapter, checked, or the merged model, compared with the trained one on the run's held-out samples; with a README.md made
    from the run.

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
    comparison, warning = None, ""
    if to == "adapter":
        temporary = fresh_folder(out)
        shutil.copytree(run.adapter, temporary, dirs_exist_ok=True)
        put_in_place(temporary, out)
        warning = _what_servers_leave_out(model)
    else:
        comparison = _merge(config, run, model, processor, out, onto, samples)
    base, evaluations = trained_base(run).name or "", (run.read_summary() or {}).get("eval") or {}
    words = str(comparison) if comparison else None
    card = model_card(config, base, evaluations, merged=words, examples=_examples(run, out))
    (out / "README.md").write_text(card, encoding="utf-8")
    return Exported(out, comparison, warning)


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder to a repository (USER/NAME) of the Hugging Face hub, made if it is not there; returns its address. The token is
    huggingface_hub's own (HF_TOKEN, or `hf auth login`).

    Raises:
        ModelError: the hub cannot be reached, or refuses.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        api = HfApi()
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=made.repo_id, commit_message="Trained by vlm_dist")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(
            f"export --push {repository}: the hub does not take it ({why}); what was exported is in {folder}. "
            "Check the name (USER/NAME), the network, and `hf auth whoami`"
        ) from None
    return str(made)


def _what_servers_leave_out(model: Any) -> str:
    """A warning where the adapter changes the vision tower or the projector."""
    family = family_of(model.get_base_model())
    names = [name.removeprefix("base_model.model.") for name, parameter in model.named_parameters() if ".lora_" in name]
    others = sorted({family.side_of(name) for name in names} - {"language"})
    if not others:
        return ""
    return (
        f"the adapter changes the {' and the '.join(others)} too; servers such as vLLM apply adapters to the language model only for most "
        "architectures, and silently: serve --to merged-16bit instead"
    )


def _examples(run: RunDir, out: Path) -> list[Example]:
    """Held-out answers that training changed, with their pictures copied beside the README."""
    before = {row["key"]: row for row in read_jsonl(run.samples / "before.jsonl")}
    found = []
    for row in read_jsonl(run.samples / "after.jsonl"):
        first = before.get(row["key"])
        if not row.get("thumbnail") or first is None or first["answer"] == row["answer"] or len(found) == SHOWN:
            continue
        picture = out / "pictures" / Path(row["thumbnail"]).name
        picture.parent.mkdir(exist_ok=True)
        shutil.copyfile(run.samples / row["thumbnail"], picture)
        found.append(Example(f"pictures/{picture.name}", row["prompt"], first["answer"], row["answer"], row["truth"]))
    return found


def _merge(config: Config, run: RunDir, model: Any, processor: Any, out: Path, onto: Onto | None, samples: int) -> Comparison:
    try:
        heldout = read_heldout(config.data, samples, Quarantine(run.quarantine, config.data.max_bad_fraction))
    except DataError:
        heldout = []  # the shards are gone: the probe's pictures serve instead
    cases = [(question_of(sample), sample.images) for sample in heldout] or None
    base = trained_base(run)
    return export_merged(model, processor, base, out, adapter=run.adapter, onto=onto, cases=cases)
