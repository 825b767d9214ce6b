"""Keys of records in other spellings (`Question`, `imagePath`, `Image Path`) -> the names that the layouts know."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from vlm_dist.data.layout_values import is_present, shown, texts_of
from vlm_dist.errors import BadSample

HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
GAPS = re.compile(r"[\s\-_]+")
FLAGS = {"question": "--question", "answer": "--answer", "caption": "--answer", "image": "--image"}


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
        if name != key and (is_present(record.get(name)) or name in made):
            if _differ(record.get(name, made.get(name)), value):
                raise BadSample(f"'{name}' and '{key}' are one name; {flag_for(name)}")
            continue
        made[name] = value
    return made


def plain(key: str) -> str:
    """In small letters with underscores: imagePath, Image Path and IMAGE-PATH are image_path."""
    return GAPS.sub("_", HUMP.sub("_", key.strip())).lower()


def only_one(record: dict[str, Any], keys: Collection[str], what: str) -> None:
    """See that not several of these keys could be the question, or the answer.

    Raises:
        BadSample: they could.
    """
    rivals = list(_differing(record, keys))
    if len(rivals) > 1:
        raise BadSample(f"'{rivals[0]}' and '{rivals[1]}' could both be the {what}; {flag_for(what)}")


def flag_for(name: str) -> str:
    """Which flag decides between two readings."""
    flag = FLAGS.get(name)
    return f"`data pack {flag} NAME` says which" if flag else "take one of them out, or give it another name"


def _differing(record: dict[str, Any], keys: Collection[str]) -> Iterator[str]:
    """Keys that hold text, each another one."""
    seen: list[list[str]] = []
    for key in keys:
        texts = texts_of(record.get(key))
        if texts and texts not in seen:
            seen.append(texts)
            yield key


def _differ(one: Any, other: Any) -> bool:
    return shown(one, 10_000) != shown(other, 10_000) and is_present(other)
