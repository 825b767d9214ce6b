"""A tokenizer for texts in which a picture's token stands hundreds of times in a row."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np


class Rows(np.ndarray):
    """Numbers [1, L] that become a tensor at once; a row is walked over as a list of Python's numbers, which processors count in."""

    def __iter__(self) -> Any:
        return iter(self.tolist()) if self.ndim == 1 else super().__iter__()


class Tokens(dict):
    """A tokenizer's answer for one text."""

    def char_to_token(self, batch_or_char: int, char: int | None = None) -> int | None:
        """The token that a character belongs to; transformers asks for it by (text, character)."""
        place, offsets = batch_or_char if char is None else char, self["offset_mapping"][0]
        found = ((offsets[:, 0] <= place) & (offsets[:, 1] > place)).nonzero()
        return int(found[0, 0]) if len(found) else None


class RunTokenizer:
    """Gives the ids and offsets that `tokenizer` gives, but tokenises each run of one picture token as a single one and repeats it
    afterwards; which is the same, because such tokens split the text wherever they stand. It takes a processor's place for its
    tokenizer, for calls with one text and with offsets; anything else goes on to the tokenizer.

    Args:
        tokens: those that stand in runs.
    """

    def __init__(self, tokenizer: Any, tokens: Iterable[str]):
        self._tokenizer = tokenizer
        self._ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
        self._runs = re.compile("|".join(f"(?:{re.escape(token)}){{2,}}" for token in self._ids)) if self._ids else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_tokenizer":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any = None, **options: Any) -> Any:
        """As a tokenizer's; tensors where `return_tensors` is "pt"."""
        is_ours = isinstance(text, list) and len(text) == 1 and options.get("return_offsets_mapping") and self._runs is not None
        if not is_ours or options.get("return_tensors") not in (None, "pt"):
            return self._tokenizer(text, **options)
        found = self._in_short(text[0], {**options, "return_tensors": None})
        return self._tokenizer(text, **options) if found is None else found

    def _in_short(self, text: str, options: dict[str, Any]) -> Tokens | None:
        """None: a run is not one token after another."""
        import torch

        assert self._runs is not None
        pieces, runs, end, length = [], [], 0, 0
        for run in self._runs.finditer(text):
            token = next(token for token in self._ids if run[0].startswith(token) and len(run[0]) % len(token) == 0)
            pieces += [text[end : run.start()], token]
            length += run.start() - end
            runs.append((length, token, len(run[0]) // len(token)))
            length, end = length + len(token), run.end()
        encoded = self._tokenizer(["".join([*pieces, text[end:]])], **options)
        ids, offsets = np.array(encoded["input_ids"][0]), np.array(encoded["offset_mapping"][0]).reshape(-1, 2)
        times, widths = np.ones(len(ids), np.int64), np.zeros(len(ids), np.int64)
        for start, token, count in runs:
            places = np.nonzero((offsets[:, 0] <= start) & (offsets[:, 1] > start))[0]
            if len(places) != 1 or ids[places[0]] != self._ids[token]:
                return None
            times[places[0]], widths[places[0]] = count, len(token)
        before = np.concatenate([[0], np.cumsum((times - 1) * widths)[:-1]]) * (offsets[:, 1] > offsets[:, 0])
        which = np.repeat(np.arange(len(ids)), times)
        within = np.arange(len(which)) - np.repeat(np.cumsum(times) - times, times)
        moved = (offsets + before[:, None])[which] + (within * widths[which])[:, None]
        made = {name: np.array(value)[:, which].view(Rows) for name, value in encoded.items() if name != "offset_mapping"}
        return Tokens(made, offset_mapping=torch.from_numpy(moved)[None])
