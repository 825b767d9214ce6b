"""The text of a configuration to plain values and the line of each key. Whatever it holds, an error is one line, and comes soon."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_dist.errors import ConfigError

LARGEST = 2**20  # bytes; 10,000 shards by name take 600,000
MOST_VALUES = 100_000
DEEPEST = 32
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_OPENED = re.compile(rf"(?:[\[{{][\s?:,-]*){{{DEEPEST + 1},}}")


def read_config_text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        ConfigError: no such file, one that cannot be read, is far too large, or is no text in UTF-8.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; give a YAML configuration such as configs/quickstart.yaml")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{str(path)[:200]}: cannot be read ({error.strerror}); give a YAML configuration") from None
    if len(content) > LARGEST:
        raise ConfigError(f"{path}: is larger than {LARGEST:,} bytes, which no configuration is; name shards by a pattern (data/*.tar)")
    for mark, name in MARKS.items():
        if content.startswith(mark):
            raise ConfigError(f"{path}: is written in {name}, expected UTF-8; save it as UTF-8")
    if b"\0" in content[:4]:
        raise ConfigError(f"{path}: is no text in UTF-8 (UTF-16 without a mark?); save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: byte {error.start} is no UTF-8; save the file as UTF-8") from None


def read_yaml(text: str, source: str) -> tuple[dict, dict[tuple, int]]:
    """Plain values of a YAML document that is a mapping, and the line of every key.

    Raises:
        ConfigError: not valid YAML, no mapping, nested too deep, or too much after aliases are followed.
    """
    document = _loaded(text, source)
    if not isinstance(document, dict):
        raise ConfigError(f"{source}: expected keys and values such as 'name: my-run', found {_kind(document)}")
    reader = _Plain(source)
    return reader.plain(document, ()), reader.lines


def read_value(text: str, source: str) -> Any:
    """Plain values of a piece of YAML, such as that of an override.

    Raises:
        ConfigError: as `read_yaml`.
    """
    return _Plain(source).plain(_loaded(text, source), ())


def _loaded(text: str, source: str) -> Any:
    from ruamel.yaml import YAML, YAMLError
    from ruamel.yaml.constructor import DuplicateKeyError

    if found := _OPENED.search(text):
        raise ConfigError(f"{source}:{_line_of(text, found.start())}: is nested more than {DEEPEST} deep, which no setting is")
    try:
        return YAML(typ="rt", pure=True).load(text)
    except DuplicateKeyError as error:
        problem = (error.problem or "a key is given twice").split(" with value")[0]
        raise ConfigError(f"{source}:{_marked(error)}: {problem}; keep one of the two") from None
    except YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{source}:{_marked(error)}: not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{source}: is nested more than {DEEPEST} deep, which no setting is") from None
    except Exception as error:  # ruamel's constructors: dates, numbers, tags and anchors that are none
        why = (str(error).splitlines() or [""])[0][:120]
        raise ConfigError(f"{source}: not valid YAML: {type(error).__name__}: {why}") from None


def _kind(document: Any) -> str:
    """In the words of who wrote it, not in those of ruamel."""
    if document is None:
        return "nothing"
    return "a list" if isinstance(document, list) else f"'{str(document)[:60]}'"


def _marked(error: Any) -> int | str:
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark else "?"


def _line_of(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


class _Plain:
    """Plain Python values of a ruamel tree. An alias counts each time it is followed."""

    def __init__(self, source: str):
        self.source = source
        self.lines: dict[tuple, int] = {}
        self._left = MOST_VALUES

    def plain(self, node: Any, path: tuple) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ConfigError(f"{self.source}: holds more than {MOST_VALUES:,} values once its aliases (*) are followed; take them out")
        if len(path) > DEEPEST:
            raise ConfigError(f"{self.source}: is nested more than {DEEPEST} deep, which no setting is")
        if isinstance(node, dict):
            return self._mapping(node, path)
        if isinstance(node, list):
            return [self.plain(value, (*path, number)) for number, value in enumerate(node)]
        for kind in (bool, int, float, str):
            if isinstance(node, kind):
                return self._scalar(kind, node, path)
        return node

    def _mapping(self, node: Any, path: tuple) -> dict:
        for key in node:
            if not isinstance(key, str):
                shown = "a list or mapping" if isinstance(key, dict | list | tuple) else repr(key)[:60]
                raise ConfigError(f"{self.source}{self._at(path)}: the key {shown} is no word; settings have names")
            line = _key_line(node, key)
            if line is not None:
                self.lines[(*path, key)] = line
        return {str(key): self.plain(value, (*path, key)) for key, value in node.items()}

    def _scalar(self, kind: Callable[[Any], Any], node: Any, path: tuple) -> Any:
        value = kind(node)
        if isinstance(value, str) and not _is_text(value):
            key = ".".join(map(str, path))
            raise ConfigError(f"{self.source}{self._at(path)}: {key} holds half a character (a lone surrogate); take it out")
        return value

    def _at(self, path: tuple) -> str:
        line = next((self.lines[path[:length]] for length in range(len(path), 0, -1) if path[:length] in self.lines), None)
        return "" if line is None else f":{line}"


def _key_line(node: Any, key: str) -> int | None:
    """Keys that came by a merge (<<) have no line of their own."""
    try:
        return node.lc.key(key)[0] + 1
    except (AttributeError, KeyError, TypeError):
        return None


def _is_text(value: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in value)
