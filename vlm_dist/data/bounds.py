"""Whether a text has more tokens than a limit, told from its beginning: what is far too long is not tokenised to its end."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

USUAL = 8  # characters a token that hardly any text has; what is shorter than so many is left to the real count
MARGIN = 64  # tokens by which a piece may count more than it does in the whole


class Beginning(NamedTuple):
    """A piece of a text's beginning that is longer than the limit."""

    tokens: int
    """So many it has at least."""
    characters: int

    def loses_one(self, text: str, tokens: Collection[str]) -> bool:
        """Whether one of these stands in the text behind it, or across its end."""
        rest = text[self.characters - max(map(len, tokens), default=0) :]
        return any(token in rest for token in tokens)


def beginning_beyond(text: str, limit: int, tokenizer: Any) -> Beginning | None:
    """The beginning of a text whose first `limit` tokens are those of the whole; None: the text may well fit.

    Pieces from the text's beginning are counted, each twice as long as the one before, so that the cost depends on the limit and not on
    the text.
    """
    length = USUAL * (limit + MARGIN)
    while length < len(text):
        count = len(tokenizer(text[:length], add_special_tokens=False)["input_ids"])
        if count > limit + MARGIN:
            return Beginning(count - MARGIN, length)
        length *= 2
    return None
