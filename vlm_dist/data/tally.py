"""What was left out, changed or not understood while samples were read: told once, with name and number."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

Note = tuple[str, str]
"""(kind, name): one of `KINDS`, and what it is about."""

KINDS = {
    "key": "keys of the JSON that nothing reads",
    "object key": "keys of objects that nothing reads",
    "pictures": "pictures of one number, taken by the names of their endings",
    "turn key": "keys of a turn that nothing reads",
    "part key": "keys of a turn's parts that nothing reads",
    "weight": "keys by which turns count less or more in the loss, which are obeyed",
    "number": "objects and captions that are the number of a class alone, which is what is learnt",
    "text": "texts beside the one that is learnt, which nothing reads",
    "member": "files beside a sample that nothing reads",
    "placeholder": "placeholders of objects in samples that have none, which stay text",
    "kept": "special tokens in the text that stay what they are (data.split_tokens makes them text)",
    "split": "turn and picture tokens typed into a text, which became text (data.keep_tokens lets them be)",
    "stripped": "what is taken away around questions and answers",
    "thought": "thoughts in answers that are not whole, which are learnt as they stand",
    "option": "answers beside options, or that are no text, and how they are read",
    "damage": "texts that look damaged, which are learnt as they stand",
    "template": "what the chat template leaves out",
    "turn": "turns that are not learnt from",
    "cut": "samples cut at data.max_seq_length",
}


class Tally:
    """Counts notes by the samples that have them. Safe to use from several threads; copies of an encoder share it."""

    def __init__(self) -> None:
        self.counts: Counter[Note] = Counter()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple]:
        return Tally, ()

    def __deepcopy__(self, memo: dict) -> Tally:
        return self

    def add(self, notes: Iterable[Note]) -> None:
        """The notes of one sample."""
        if found := set(notes):
            with self._lock:
                self.counts.update(found)

    def to_dict(self) -> dict[str, dict[str, int]]:
        """kind -> name -> samples."""
        return by_kind(self.counts)


def by_kind(counts: Mapping[Note, int]) -> dict[str, dict[str, int]]:
    """kind -> name -> samples, the kinds in the order of `KINDS`, the names by how many."""
    found: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        names = sorted(((count, name) for (one, name), count in counts.items() if one == kind), key=lambda pair: (-pair[0], pair[1]))
        if names:
            found[kind] = {name: count for count, name in names}
    return found


def summed(parts: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """`Tally.to_dict` of several ranks or processes, together."""
    total: Counter[Note] = Counter()
    for part in parts:
        for kind, names in part.items():
            total.update({(kind, name): count for name, count in names.items()})
    return by_kind(total)


def in_words(found: Mapping[str, Mapping[str, Any]], most: int = 12) -> list[str]:
    """A line a kind: "keys of the JSON that nothing reads: source (16 samples), weight (2 samples)"."""
    lines = []
    for kind, names in found.items():
        shown = [f"{name} ({count:,} sample{'s' if count != 1 else ''})" for name, count in list(names.items())[:most]]
        more = f" and {len(names) - most} more" if len(names) > most else ""
        lines.append(f"{KINDS[kind]}: {', '.join(shown)}{more}")
    return lines
