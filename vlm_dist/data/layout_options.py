"""Multiple choice as data sets write it -> a question with lettered options, and the letter that answers it. No file is opened."""

from __future__ import annotations

import re
from typing import Any

from vlm_dist.data.layout_values import parsed, texts_of
from vlm_dist.errors import BadSample

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPTION_KEYS = ("options", "choices")
LETTER_KEY = re.compile(r"(?:(?:choice|option|opt)[ _-]?)?([A-Ja-j])", re.IGNORECASE)
LETTERED = re.compile(r"\(?(?P<label>[A-Z]|\d{1,2})(?:\)|[.:](?=\s))\s*(?P<text>\S.*)", re.DOTALL)
"""An option with its letter in it: "A. cat", "(A) cat", "B: cat"."""
NAME_KEYS, WORD_KEYS = ("label", "key", "id", "letter", "option", "idx"), ("text", "value", "content", "option", "choice", "answer")

Options = list[tuple[str, str]]
"""(label, text) of each."""


def question_with_options(record: dict[str, Any], question: str) -> tuple[str, Options, list[str]]:
    """(question with hint and lettered options, the options, the keys read); those that the question lists are not listed twice."""
    keys = _letter_keys(record)
    options = _labelled([texts_of(record[key])[0] for key in keys])
    if not keys:
        key = next((key for key in OPTION_KEYS if isinstance(record.get(key), str | list | tuple | dict)), None)
        value = parsed(record[key]) if key and isinstance(record[key], str) else record[key] if key else None
        options = _options(value)
        keys = [key] if key and len(options) > 1 else []
    if not keys:
        return question, [], []
    hint = texts_of(record.get("hint"))
    listed = [] if _lists(question, options) else [f"{label}. {text}" for label, text in options]
    return "\n".join([*hint[:1], question, *listed]), options, [*keys, *(["hint"] if hint else [])]


def answer_among(answer: Any, options: Options) -> Any:
    """The option's label where the answer is its number, from 0, or the option with its letter; everything else as it is.

    Raises:
        BadSample: the number of one option is the text of another.
    """
    texts, labels = [text for _, text in options], [label for label, _ in options]
    is_number = isinstance(answer, str) and re.fullmatch(r"\d{1,2}", answer) is not None
    if is_number and answer in texts and answer not in labels and int(answer) < len(texts) and texts[int(answer)] != answer:
        raise BadSample(
            f"the answer {answer} may be the option '{answer}' ({labels[texts.index(answer)]}), or the number of an option, from 0 "
            f"({labels[int(answer)]}); write the letter"
        )
    if isinstance(answer, str) and (answer in texts or answer in labels):
        return answer
    if isinstance(answer, str) and (written := LETTERED.fullmatch(answer.strip())) and (written["label"], written["text"]) in options:
        return written["label"]
    number = int(answer) if is_number else answer
    if isinstance(number, int) and not isinstance(number, bool):
        return str(number) if str(number) in labels else labels[number] if 0 <= number < len(labels) else answer
    return answer


def _letter_keys(record: dict[str, Any]) -> list[str]:
    """Keys of options of their own: `A`, `B`, ..., or `option_a`, `choice_B`; from A on, two or more."""
    found: dict[str, str] = {}
    for key in record:
        match = LETTER_KEY.fullmatch(key) if isinstance(key, str) and (len(key) > 1 or key.isupper()) else None
        if match and texts_of(record[key]):
            found.setdefault(match[1].upper(), key)
    letters = sorted(found)
    return [found[letter] for letter in letters] if len(letters) > 1 and letters[0] == "A" else []


def _options(value: Any) -> Options:
    """Of a list of texts, a list of {label, text}, {"A": ..., "B": ...} or {"label": [...], "text": [...]}."""
    if isinstance(value, dict):
        names, words = (next((value[key] for key in keys if isinstance(value.get(key), list)), None) for keys in (NAME_KEYS, WORD_KEYS))
        if words is not None:
            return _labelled([text for item in words for text in texts_of(item)[:1]], names)
        items = [(key, texts_of(item)) for key, item in value.items() if isinstance(key, str)]
        return _labelled([texts[0] for _, texts in items if texts], [key for key, texts in items if texts])
    if not isinstance(value, list | tuple):
        return []
    if value and all(isinstance(item, dict) and len(item) == 1 for item in value):  # [{"A": "cat"}, {"B": "dog"}]
        return _options({key: text for item in value for key, text in item.items()})
    names = [next((item[key] for key in NAME_KEYS if key in item), None) if isinstance(item, dict) else None for item in value]
    words = [next((item[key] for key in WORD_KEYS if texts_of(item.get(key))), item) if isinstance(item, dict) else item for item in value]
    found = [(name, texts_of(word)[0]) for name, word in zip(names, words, strict=True) if texts_of(word)]
    return _labelled([text for _, text in found], [name for name, _ in found])


def _labelled(texts: list[str], names: Any = None) -> Options:
    """With the labels that they have, each another, else by letters."""
    names = [str(name).strip() for name in names] if isinstance(names, list) and len(names) == len(texts) and None not in names else []
    written = [LETTERED.fullmatch(text) for text in texts]
    if texts and all(written) and _follow([match["label"] for match in written if match]):
        return [(match["label"], match["text"].strip()) for match in written if match]
    if not (names and all(re.fullmatch(r"[A-Z]|[a-z]|\d{1,2}", name) for name in names) and len(set(names)) == len(names)):
        names = [LETTERS[number % 26] for number in range(len(texts))]
    return list(zip(names, texts, strict=True))


def _follow(labels: list[str]) -> bool:
    """A, B, C or 1, 2, 3: letters of a list, not the first words of its texts."""
    return labels in (list(LETTERS[: len(labels)]), *([str(start + number) for number in range(len(labels))] for start in (0, 1)))


def _lists(question: str, options: Options) -> bool:
    """Whether every option stands in the question behind its own label."""
    return all(re.search(rf"(?:^|[\s(\[]){re.escape(label)}[.):\]]\s*{re.escape(text)}", question) for label, text in options)
