"""YAML and overrides -> `Config`, with errors that name file, line, key, what was found and what is known.

YAML is read by its version 1.2 (ruamel.yaml): `1e-4` is a number, `on` is a word, and a key given twice is an error.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from vlm_dist.config import Config
from vlm_dist.config_text import read_config_text, read_value, read_yaml
from vlm_dist.errors import ConfigError
from vlm_dist.redaction import lacks_secret, redacted_tree


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply dotted overrides such as `optim.lr=2e-4`.

    Returns:
        The configuration, every default filled in.

    Raises:
        ConfigError: one line per problem: file, line, key, what was found, what is expected.
    """
    return parse_config(read_config_text(Path(path)), overrides, source=str(path))


def parse_config(text: str, overrides: Iterable[str] = (), source: str = "config") -> Config:
    """Like `load_config`, for YAML in a string; `source` names it in errors."""
    tree, lines = read_yaml(text, source)
    for override in overrides:
        _apply(tree, lines, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = [_describe(problem, lines, source) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None


def dump_config(config: Config) -> str:
    """The whole resolved configuration as YAML, without secrets."""
    from ruamel.yaml import YAML
    from ruamel.yaml.compat import StringIO

    stream = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(redacted_tree(config.model_dump(mode="json")), stream)
    return stream.getvalue()


def write_changed(source: Path, out: Path, settings: dict[str, Any], overrides: Iterable[str] = ()) -> None:
    """A copy of a YAML file with some dotted settings changed, after `overrides` of the command line; comments and order stay."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.width, yaml.preserve_quotes = 4096, True
    tree = yaml.load(source.read_text(encoding="utf-8"))
    for override in overrides:
        _apply(tree, {}, override)
    for key, value in settings.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    with out.open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)


def differences(old: Config, new: Config, sections: Iterable[str], harmless: Iterable[str] = ()) -> list[str]:
    """`key: old -> new` for each leaf that differs in the given top-level sections and is not among the `harmless`."""
    passed_over = tuple(f"{key}." for key in harmless)
    found = differing([old, new], sections)
    return [f"{key}: {before} -> {after}" for key, (before, after) in found if not f"{key}.".startswith(passed_over)]


def differing(configs: Sequence[Config], sections: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(key, its value in each as JSON) of the leaves in the given top-level sections that are not alike in all, secrets left out."""
    flat = [dict(_leaves(redacted_tree(config.model_dump(mode="json")))) for config in configs]
    wanted = tuple(sections)
    keys = dict.fromkeys(key for one in flat for key in one if key.split(".")[0] in wanted)
    values = [(key, [json.dumps(one.get(key)) for one in flat]) for key in keys]
    return [(key, each) for key, each in values if len(set(each)) > 1]


def without_secrets(config: Config) -> Config:
    """The same as others may read it."""
    return Config.model_validate(redacted_tree(config.model_dump(mode="json")))


def refuse_without_secrets(config: Config, keys: Iterable[str] = ()) -> None:
    """What a run keeps of its configuration holds no secrets, and so cannot fetch what needs one.

    Args:
        keys: only these are looked at; none: all.

    Raises:
        ConfigError: an address lacks its secret.
    """
    wanted = tuple(keys)
    for key, value in _leaves(config.model_dump(mode="json")):
        if wanted and key not in wanted:
            continue
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and lacks_secret(text):
                raise ConfigError(
                    f"{key}: '{_cut(text)}' lacks what a run's config.yaml leaves out (password, key or signature); "
                    f"start from your own configuration, or give {key}=ADDRESS"
                )


def explain() -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every field, in order."""
    yield from _explain(Config, "")


def json_schema() -> dict[str, Any]:
    """JSON schema of the configuration, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def _apply(tree: dict, lines: dict[tuple, int], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"command line: '{override}' is no override; expected KEY=VALUE such as optim.lr=2e-4")
    try:
        value = read_value(text, "value") if text else None
    except ConfigError as error:
        problem = str(error).partition(": ")[2]
        problem = " is not valid YAML" if problem.startswith("not valid") else f": {problem}"
        raise ConfigError(f"command line: the value in '{_cut(override)}'{problem}") from None
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[last] = value
    for known in [path for path in lines if path[: len(parents) + 1] == (*parents, last)]:
        del lines[known]
    lines[(*parents, last)] = 0  # 0: from the command line


def _cut(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _describe(problem: Any, lines: dict[tuple, int], source: str) -> str:
    location = tuple(problem["loc"])
    key = ".".join(str(part) for part in location)
    where = _where(location, lines, source)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'; {_suggest(location)}"
    if problem["type"] == "missing":
        return f"{where}: '{key}' is missing; see `vlm-dist config --explain`"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}"
    found = json.dumps(problem["input"], default=str)
    return f"{where}: {key}={found if len(found) < 80 else found[:77] + '...'}: {message[0].lower()}{message[1:]}"


def _where(location: tuple, lines: dict[tuple, int], source: str) -> str:
    for length in range(len(location), 0, -1):
        line = lines.get(location[:length])
        if line is not None:
            return f"{source}:{line}" if line else "command line"
    return source


def _suggest(location: tuple) -> str:
    keys = [key for key, _, _, _ in explain()]
    full, last = ".".join(map(str, location)), str(location[-1])
    parent = full.rpartition(".")[0]
    siblings = sorted(key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == parent)
    near = difflib.get_close_matches(last, siblings, 1, 0.6)
    if near:
        return f"did you mean '{parent}.{near[0]}'?" if parent else f"did you mean '{near[0]}'?"
    elsewhere = [key for key in keys if key.split(".")[-1] == last] or difflib.get_close_matches(full, keys, 1, 0.6)
    if elsewhere:
        return f"did you mean '{elsewhere[0]}'?"
    return f"known here: {', '.join(siblings)}"


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _explain(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = _section_of(field.annotation)
        meaning = field.description or ((inner.__doc__ or "").strip().split("\n")[0] if inner else "")
        default = "required" if field.is_required() else _show_default(field.default)
        yield key, "section" if inner else _show_type(field.annotation), default, meaning
        if inner:
            yield from _explain(inner, f"{key}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _show_default(value: Any) -> str:
    return "see below" if isinstance(value, BaseModel) else json.dumps(value)


def _show_type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if part is type(None) else _show_type(part) for part in parts)
    if origin is typing.Annotated:
        return _show_type(parts[0])
    if origin in (list, tuple, dict):
        return f"{origin.__name__} of {', '.join(dict.fromkeys(_show_type(part) for part in parts))}"
    return getattr(annotation, "__name__", str(annotation))
