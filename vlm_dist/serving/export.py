"""A finished run, or an adapter -> a folder for use elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_dist.cards import device_here
from vlm_dist.config import Config, DataConfig, ModelConfig
from vlm_dist.config_load import load_config
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.data.heldout import read_heldout
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.samples import Sample
from vlm_dist.errors import BadSample, ConfigError, DataError, ModelError
from vlm_dist.models.adapters import base_of, find_adapter, has_processor, run_of
from vlm_dist.models.card import Example, adapter_card, model_card
from vlm_dist.models.comparison import Comparison
from vlm_dist.models.export import export_merged
from vlm_dist.models.introspect import family_of
from vlm_dist.models.merge import Onto
from vlm_dist.models.record import read_system_prompt, write_record
from vlm_dist.models.save import fresh_folder, put_in_place
from vlm_dist.models.source import brings_code
from vlm_dist.models.trained import load_adapter
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
    source: Path, to: Literal["adapter", "merged-16bit"], out: Path | None = None, *, onto: Onto | None = None, samples: int = 8,
    dtype: str = "auto", base_model: str | None = None,
) -> Exported:  # fmt: skip
    """Write the adapter, checked, or the merged model, compared with the trained one on the run's held-out samples (of an adapter that is
    of no run, on two drawn pictures); with a README.md that says what it is made from.

    Args:
        source: a run directory or an adapter folder.
        out: a folder that does not exist yet; None: below the run directory, replaced if it is there; or beside the adapter folder.
        dtype: number type of a merged model; see `export_merged`.
        base_model: where the base is now, if not where the adapter's files say.

    Raises:
        ConfigError: no run and no adapter, a run without adapter, or `out` is taken.
        ModelError: the run is not finished, or the adapter does not fit its base.
    """
    made = _find(source)
    if out is None and not made.is_result:
        out = made.adapter.with_name(f"{made.adapter.resolve().name}-{to}")
    if out is not None and out.exists():
        raise ConfigError(f"--out: '{out}' exists already; give a new folder")
    out = out or RunDir(made.adapter.parent).path / "export" / to
    base = base_of(made.adapter, base_model)
    model, processor = load_adapter(made.adapter, base, device_here())  # checks the adapter against its record
    comparison, warning = None, ""
    with _whole_or_not_there(out):
        if to == "adapter":
            _copy(made.adapter, processor, out, base_model)
            warning = _what_servers_leave_out(model)
        else:
            comparison = _merge(made, model, processor, base, out, onto, samples, dtype)
            if (system := read_system_prompt(made.adapter)) is not None:
                write_record({"version": 1, "system_prompt": system}, out)
        _write_card(made, base.name or "", comparison, out)
    return Exported(out, comparison, warning)


@contextmanager
def _whole_or_not_there(out: Path) -> Iterator[None]:
    """What fails on the way (a full disk) leaves nothing that takes up room, and nothing in the way of the same command."""
    was_there = out.exists()
    try:
        yield
    except BaseException:
        shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)
        if not was_there:
            shutil.rmtree(out, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _Made:
    """What is exported, and the run that it is of, if it is of one."""

    adapter: Path
    run: RunDir | None
    config: Config | None

    @property
    def is_result(self) -> bool:
        """The run's own adapter, not one of its checkpoints."""
        return self.run is not None and self.adapter.name == self.run.adapter.name


def _find(source: Path) -> _Made:
    run = RunDir(source)
    if not run.config.exists():
        adapter = find_adapter(str(source))
        if adapter is None:
            raise ConfigError(
                f"{source}: no run directory (no config.yaml in it) and no adapter (no adapter_config.json); "
                "give one such as runs/quickstart or runs/quickstart/adapter"
            )
        of_run = run_of(adapter)
        return _Made(adapter, of_run, load_config(of_run.config) if of_run else None)
    config = load_config(run.config)
    if config.lora is None:
        raise ConfigError(f"{source}: trained every weight, so there is nothing to merge; its model is {run.model}")
    adapter = find_adapter(str(source))
    assert adapter is not None
    return _Made(adapter, run, config)


def _copy(adapter: Path, processor: Any, out: Path, base_model: str | None) -> None:
    """The adapter folder, with a processor in it, and naming the base where it is now."""
    temporary = fresh_folder(out)
    shutil.copytree(adapter, temporary, dirs_exist_ok=True)
    if not has_processor(adapter):
        processor.save_pretrained(temporary)
    if base_model is not None:
        path = temporary / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base_model}, indent=2) + "\n")
    put_in_place(temporary, out)


def _write_card(made: _Made, base: str, comparison: Comparison | None, out: Path) -> None:
    words = str(comparison) if comparison else None
    own_code = brings_code(base)
    if made.run is not None and made.config is not None:
        evaluations = (made.run.read_summary() or {}).get("eval") or {}
        card = model_card(made.config, base, evaluations, merged=words, examples=_examples(made.run, out), own_code=own_code)
    elif words is None and (out / "README.md").exists():
        return  # its own says more
    else:
        card = adapter_card(made.adapter.resolve().name, base, merged=words, own_code=own_code)
    (out / "README.md").write_text(card, encoding="utf-8")


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
    before, after = (
        {(row.get("number", line), row["key"]): row for line, row in enumerate(read_jsonl(run.samples / f"{phase}.jsonl"))}
        for phase in ("before", "after")
    )
    found = []
    for place, row in after.items():
        first = before.get(place)
        if not row.get("thumbnail") or first is None or first["answer"] == row["answer"] or len(found) == SHOWN:
            continue
        picture = out / "pictures" / Path(row["thumbnail"]).name
        picture.parent.mkdir(exist_ok=True)
        shutil.copyfile(run.samples / row["thumbnail"], picture)
        found.append(Example(f"pictures/{picture.name}", row["prompt"], first["answer"], row["answer"], row["truth"]))
    return found


def _merge(
    made: _Made, model: Any, processor: Any, base: ModelConfig, out: Path, onto: Onto | None, samples: int, dtype: str
) -> Comparison:  # fmt: skip
    heldout = []
    if made.run is not None and made.config is not None:
        data = made.config.data
        with suppress(DataError):  # the shards are gone: the probe's pictures serve instead
            heldout = read_heldout(data, samples, Quarantine(made.run.quarantine, data.max_bad_fraction))
    cases = [(question_of(sample), sample.images) for sample in heldout if not sample.videos] or None
    answers = _answers(heldout, processor, made.config.data) if made.config is not None else []
    return export_merged(model, processor, base, out, adapter=made.adapter, onto=onto, cases=cases, answers=answers, dtype=dtype)


def _answers(heldout: list[Sample], processor: Any, data: DataConfig) -> list[dict[str, Any]]:
    """Held-out conversations as training would be fed with them; what cannot be used is named in the quarantine when it is scored."""
    encoder, found = Encoder.of(processor, data), []
    for sample in heldout:
        with suppress(BadSample):
            found.append(collate([encoder.encode(sample)], processor.tokenizer.pad_token_id))
    return found
