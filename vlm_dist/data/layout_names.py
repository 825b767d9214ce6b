"""Keys of records in other spellings (`Question`, `imagePath`, `Image Path`) -> the names that the layouts know."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from vlm_dist.data.layout_keys import CAPTIONS, RIVALS
from vlm_dist.data.layout_values import PICTURE_KEYS, is_present, shown, texts_of
from vlm_dist.errors import BadSample

HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
GAPS = re.compile(r"[\s\-_]+")
LONGEST = 10_000  # characters of two values that are compared
FLAGS = {
    **dict.fromkeys(PICTURE_KEYS, "--image"), **dict.fromkeys((*CAPTIONS, *RIVALS["answer"]), "--answer"),
    **dict.fromkeys(RIVALS["question"], "--question"),
}  # fmt: skip
"""Which flag of `data pack` decides between two readings."""


def in_known_names(record: dict[str, Any], known: Collection[str], kept: Collection[str] = ()) -> dict[str, Any]:
    """A record whose keys are called as the layouts call them; where both are there and say the same, the known one.

    Args:
        kept: keys that the user names, which stay.

    Raises:
        BadSample: two keys are one name in two spellings, and say different things.
    """
    if all(key in known or key in kept for key in record):
        return record
    made: dict[str, Any] = {}
    for key, value in record.items():
        name = plain(key) if isinstance(key, str) and key not in known and key not in kept else key
        name = name if name in known else key
        other = record.get(name, made.get(name)) if name != key else None
        if is_present(other) and is_present(value) and shown(other, LONGEST) != shown(value, LONGEST):
            if name in FLAGS and name not in kept:
                raise BadSample(f"'{name}' and '{key}' are one name; `data pack {FLAGS[name]} NAME` says which")
            name = key
        if name == key or not is_present(other):
            made[name] = value
    return made


def plain(key: str) -> str:
    """In small letters with underscores: imagePath, Image Path and IMAGE-PATH are image_path."""
    return GAPS.sub("_", HUMP.sub("_", key.strip())).lower()


def only_one(record: dict[str, Any], what: str, keys: Collection[str] | None = None) -> None:
    """See that not several keys could be the question, the answer or the caption (`RIVALS`).

    Raises:
        BadSample: they could.
    """
    rivals = list(_differing(record, RIVALS[what] if keys is None else keys))
    if len(rivals) > 1:
        raise BadSample(f"'{rivals[0]}' and '{rivals[1]}' could both be the {what}; `data pack {FLAGS[rivals[0]]} NAME` says which")


def _differing(record: dict[str, Any], keys: Collection[str]) -> Iterator[str]:
    """Keys that hold text, each another one."""
    seen: list[list[str]] = []
    for key in keys:
        texts = texts_of(record.get(key))
        if texts and texts not in seen:
            seen.append(texts)
            yield key
