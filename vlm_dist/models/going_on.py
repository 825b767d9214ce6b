"""Training that goes on from an adapter: `model.name` is an adapter folder or a run, and the adapter decides rank and modules."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_dist.config import Config, LoraConfig
from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.families import Family
from vlm_dist.models.adapters import WEIGHTS, base_of, find_adapter, read_adapter_config
from vlm_dist.models.experts import ROUTERS, of_experts
from vlm_dist.models.files import opened
from vlm_dist.models.load import read_model_config
from vlm_dist.models.record import read_record
from vlm_dist.run_dir import RunDir

FIRST_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?A(?:\.weight)?$")
SWITCHES = ("vision", "language", "attention", "mlp")  # true: may be adapted
OWN = (
    "r_vision", "r_projector", "r_language", "alpha_vision", "alpha_projector", "alpha_language", "alpha_experts", "modules", "layers",
    "modules_to_save",
)  # fmt: skip


def settle(config: Config) -> Config:
    """The configuration with what its starting point decides: of an adapter, the lora section, and how the base is held unless
    `model.load_in_4bit` says; of a run that trained every weight, the folder of its model. Settling twice changes nothing.

    Raises:
        ConfigError: lora is null, or asks for another form of adapter than the one that is there.
        ModelError: the adapter is damaged, of a kind that cannot be trained on, or its base is not there.
    """
    if config.model.name is None:
        return config
    folder = find_adapter(config.model.name)
    if folder is None:
        run = RunDir(Path(config.model.name))
        return _with(config, name=str(run.model)) if run.config.exists() else config
    if config.lora is None:
        raise ConfigError(
            f"lora: null, but model.name: '{config.model.name}' is an adapter, which trains on as one; leave lora away, "
            "or merge it first (vlm-dist export --to merged-16bit) and train that"
        )
    base = base_of(folder)
    record = read_record(folder)
    given = config.model.model_fields_set
    form = record["base"]["load_in_4bit"] if record else base.load_in_4bit
    model: dict[str, Any] = {} if "load_in_4bit" in given else {"load_in_4bit": form}
    if "revision" not in given:
        model["revision"] = base.revision
    settled = _with(config, **model)
    _, family = read_model_config(settled.model, str(base.name))
    return settled.model_copy(update={"lora": lora_of(folder, family, config.lora)})


def lora_of(folder: Path, family: Family, given: LoraConfig) -> LoraConfig:
    """The lora section that an adapter is of; what no switch can say (single modules) is left as it is. Dropout is not of the adapter's
    form, so one that is given counts.

    Raises:
        ConfigError: a setting that was given says otherwise.
        ModelError: it is no LoRA adapter.
    """
    settings = read_adapter_config(folder)
    if settings["peft_type"] != "LORA":
        raise ModelError(f"{folder}: a {settings['peft_type']} adapter; only LoRA adapters can be trained further")
    found = _Found(family, settings)
    for name, rank in _ranks(folder).items():
        found.add(name, rank)
    values = found.values()
    for name in given.model_fields_set & values.keys():
        wanted = getattr(given, name)
        if name == "dropout" or (name in OWN and not wanted) or (name in SWITCHES and wanted) or (name, wanted) == ("experts", "auto"):
            continue
        if not _agree(wanted, values[name]):
            raise ConfigError(
                f"lora.{name}: {wanted}, but the adapter in {folder} has {values[name]}, and training goes on with its form; leave "
                f"lora.{name} away, or merge it first (vlm-dist export --to merged-16bit) and put a new adapter on that"
            )
    if values["experts"] == "lora" and given.dropout and "dropout" in given.model_fields_set:
        raise ConfigError(f"lora.dropout: {given.dropout}, but the adapter in {folder} is on experts too, which have none; set it to 0")
    kept = {name for name in ("dropout", "modules", "layers") if name in given.model_fields_set}
    return given.model_copy(update={name: value for name, value in values.items() if name not in {"modules", "layers"} | kept})


@dataclass
class _Found:
    """What the adapted modules are, as the settings of `LoraConfig`."""

    family: Family
    settings: dict[str, Any]
    ranks: dict[str, set[int]] = field(default_factory=dict)
    alphas: dict[str, set[float]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def add(self, name: str, rank: int) -> None:
        """An adapted module. The A of experts is that of all of them, so its size is not their rank."""
        if of_experts(f"{name}."):
            return
        side = self.family.side_of(name)
        self.ranks.setdefault(side, set()).add(rank)
        self.alphas.setdefault(side, set()).add(self._own("alpha_pattern", name, self.settings["lora_alpha"]))
        self.names.append(name)

    def _own(self, key: str, name: str, usual: Any) -> Any:
        """The rank or alpha of a module or parameter, by a pattern of PEFT."""
        patterns = (self.settings.get(key) or {}).items()
        return next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", name)), usual)

    def values(self) -> dict[str, Any]:
        settings, parts = self.settings, {part for name in self.names for part in name.split(".")}
        whole = settings.get("modules_to_save") or []
        of_projector = [name for name in whole if any(f"{name}.".startswith(f"{path}.") for path in self.family.projector)]
        of_router = [name for name in whole if name.rpartition(".")[2] in ROUTERS]
        found: dict[str, Any] = {
            "r": settings["r"], "alpha": float(settings["lora_alpha"]), "dropout": settings.get("lora_dropout") or 0.0,
            "bias": settings.get("bias") or "none", "rslora": bool(settings.get("use_rslora")), "dora": bool(settings.get("use_dora")),
            "projector": "full" if of_projector else "lora" if "projector" in self.ranks else "frozen",
            "router": "full" if of_router else "frozen",
            "modules_to_save": [name for name in whole if name not in of_projector + of_router],
            "modules": sorted({name.rpartition(".")[2] for name in self.names}), "layers": self._layers(),
        }  # fmt: skip
        experts = settings.get("target_parameters") or []
        found["experts"] = "lora" if experts else "off"
        if experts:
            found["r_experts"] = self._own("rank_pattern", experts[0], found["r"])
            found["alpha_experts"] = float(self._own("alpha_pattern", experts[0], found["alpha"]))
        for side in ("vision", "projector", "language"):
            for key, values, usual in (("r", self.ranks, found["r"]), ("alpha", self.alphas, found["alpha"])):
                own = values.get(side, set())
                found[f"{key}_{side}"] = next(iter(own)) if len(own) == 1 and own != {usual} else None
        kinds = {kind: not parts.isdisjoint(getattr(self.family, kind)) for kind in ("attention", "mlp")}
        sides = {side: side in self.ranks for side in ("vision", "language")}
        if any(kinds.values()) and any(sides.values()):  # else it is on single modules, or on none
            found |= kinds | sides
        return found

    def _layers(self) -> dict[str, list[int]]:
        layers: dict[str, set[int]] = {}
        for name in self.names:
            if number := re.search(r"\.(\d+)\.", name):
                layers.setdefault(self.family.side_of(name), set()).add(int(number[1]))
        return {side: sorted(numbers) for side, numbers in layers.items() if side != "projector"}


def _ranks(folder: Path) -> dict[str, int]:
    """The rank of each adapted module, read from the headers of the stored tensors."""
    with opened(folder / WEIGHTS) as stored:
        names = {key: match[1] for key in stored.keys() if (match := FIRST_FACTOR.match(key))}  # noqa: SIM118
        return {name: stored.get_slice(key).get_shape()[0] for key, name in names.items()}


def _agree(wanted: Any, found: Any) -> bool:
    """Whether the adapter is what a setting asks for; of layers and modules no more than that, since some are never adapted."""
    if isinstance(wanted, dict):
        return all(_agree(numbers, found.get(side, [])) for side, numbers in wanted.items())
    if not isinstance(wanted, list):
        return wanted == found
    from_the_end = any(isinstance(one, int) and one < 0 for one in wanted)
    return len(found) <= len(wanted) if from_the_end else set(found) <= set(wanted)


def _with(config: Config, **model: Any) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=model)})
