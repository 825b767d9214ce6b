"""JSON of data sets -> values. An object that has a key twice says two things, of which Python's reader would keep the last."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from vlm_dist.errors import BadSample

SHOWN = 40  # characters of a value


class Twice(dict):
    """An object in which a key stands twice, with the last value of each."""

    def __init__(self, pairs: list[tuple[str, Any]], key: str):
        super().__init__(pairs)
        self.key = key
        values = " and with ".join(_short(value) for name, value in pairs if name == key)
        self.reason = f"the key {_short(key)} stands twice, with {values}; leave one of them out"


def read_document(text: str | bytes) -> tuple[Any, bool]:
    """(value, whether any object in it is a `Twice`).

    Raises:
        ValueError, RecursionError: as of `json.loads`.
    """
    found = False

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        plain = dict(pairs)
        if len(plain) == len(pairs):
            return plain
        key = next((name for name, value in pairs if plain[name] != value), None)
        if key is None:
            return plain
        found = True
        return Twice(pairs, key)

    value = json.loads(text, object_pairs_hook=made)
    return value, found


def read_object(text: str | bytes) -> Any:
    """The value of one sample's JSON.

    Raises:
        BadSample: a key stands twice in one of its objects, with different values.
        ValueError, RecursionError: as of `json.loads`.
    """
    value, found = read_document(text)
    if found:
        refuse_twice(value)
    return value


def refuse_twice(value: Any) -> None:
    """Raises:
    BadSample: there is a `Twice` in it.
    """
    if (twice := next(_twices(value), None)) is not None:
        raise BadSample(twice.reason)


def _twices(value: Any) -> Iterator[Twice]:
    if isinstance(value, Twice):
        yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _twices(inner)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
