"""Whether a text has more tokens than a limit, told from its beginning: what is far too long is not tokenised to its end."""

from __future__ import annotations

from typing import Any

USUAL = 8  # characters a token that hardly any text has; what is shorter than so many is left to the real count
MARGIN = 64  # tokens by which a piece may count more than it does in the whole


def tokens_beyond(text: str, limit: int, tokenizer: Any) -> int | None:
    """A number of tokens above the limit that a text has at least; None: it may well fit.

    Pieces from the text's beginning are counted, each twice as long as the one before, so that the cost depends on the limit and not on
    the text.
    """
    length = USUAL * (limit + MARGIN)
    while length < len(text):
        count = len(tokenizer(text[:length], add_special_tokens=False)["input_ids"])
        if count > limit + MARGIN:
            return count - MARGIN
        length *= 2
    return None
