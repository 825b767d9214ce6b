"""Texts that something on the way has damaged, by the traces that it leaves. They are learnt as they stand, and told."""

from __future__ import annotations

import re

TRACES = {
    "characters that nobody sees (U+200B, U+FEFF, control characters)": "[\u200b\ufeff\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f]",
    "U+FFFD in the place of characters that were lost": "\ufffd",
    "UTF-8 that was read as another encoding (\u00c3\u00a9, \u00e2\u20ac\u2122)": (
        "\u00c3[\u00a1-\u00bf]|\u00e2\u20ac[\u2122\u0153\u201c\u201d\u00a6]|\u00c2[\u00a0-\u00bf]"
    ),
    "line breaks that were escaped twice (\\n)": r"\\n(?![A-Za-z])",  # no \nabla
    "HTML's entities (&amp;)": r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{2,4}|#x[0-9a-fA-F]{2,4});",
}
ANY = re.compile("|".join(TRACES.values()))
NOTHING = frozenset({"nan", "NaN", "None", "null", "NULL", "<NA>", "NaT", "undefined"})
"""What tables and programs write in the place of nothing; the words of people are "none" and "n/a"."""


def traces_in(text: str, *, is_said: bool) -> list[str]:
    """In words.

    Args:
        is_said: whether it is what a model is to say.
    """
    found = [name for name, trace in TRACES.items() if re.search(trace, text)] if ANY.search(text) else []
    return [*found, "nan, None or null in the place of an answer"] if is_said and text.strip() in NOTHING else found
