"""Multiple choice as data sets write it -> a question with lettered options, and the letter that answers it. No file is opened."""

from __future__ import annotations

import re
from typing import Any

from vlm_dist.data.layout_keys import ANSWERS, KNOWN
from vlm_dist.data.layout_names import in_known_names
from vlm_dist.data.layout_values import is_present, parsed, shown, texts_of
from vlm_dist.errors import BadSample

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPTION_KEYS = ("options", "choices")
LETTER_KEY = re.compile(r"(?:(?:choice|option|opt)[ _-]?)?([A-Ja-j])", re.IGNORECASE)
LETTERED = re.compile(r"[(（]?(?P<label>[A-Z]|\d{1,2})(?:[)）、．：]|[.:](?=\s))\s*(?P<text>\S.*)", re.DOTALL)
"""An option with its letter in it: "A. cat", "(A) cat", "B: cat", "B、cat"."""
A_NUMBER = re.compile(r"(-?\d{1,2})(?:\.0)?")
"""Of an option; 1.0 is what tables with empty cells make of 1."""
A_LETTER = re.compile(r"[(（\[]?([A-Za-z])[)）\].:、．：]?")
"""Of an option, as people write it: B, b, (B), B."""
NAME_KEYS, WORD_KEYS = ("label", "key", "id", "letter", "option", "idx"), ("text", "value", "content", "option", "choice", "answer")

Options = list[tuple[str, str]]
"""(label, text) of each place; the text of an empty one is empty, so that the others keep their numbers."""


def question_with_options(record: dict[str, Any], question: str) -> tuple[str, Options, list[str]]:
    """(question with hint and lettered options, the options, the keys read); those that the question lists are not listed twice."""
    own = _letter_keys(record)
    options, keys = (
        _labelled([_words(record[key] if key else None) for key in own.values()], list(own)),
        [key for key in own.values() if key],
    )
    if not keys:
        key = next((key for key in OPTION_KEYS if isinstance(record.get(key), str | list | tuple | dict)), None)
        options = _options(_value(record[key])) if key else []
        keys = [key] if key and sum(bool(text) for _, text in options) > 1 else []
    if not keys:
        return question, [], []
    hint = texts_of(record.get("hint"))
    listed = [] if _lists(question, options) else [f"{label}. {text}" for label, text in options if text]
    return "\n".join([*hint[:1], question, *listed]), options, [*keys, *(["hint"] if hint else [])]


def option_said(value: Any, record: dict[str, Any], options: Options) -> list[str]:
    """What a record gives as the answer -> the labels, or the texts, that it stands for.

    Raises:
        BadSample: no option has this number or letter; it may be an option's number or its text; or the options cannot be read.
    """
    if not options:
        key = next((key for key in OPTION_KEYS if isinstance(record.get(key), str) and record[key].strip()), None)
        if key and any(re.fullmatch(r"[A-Z]|\d{1,2}", text) for text in texts_of(value)):
            raise BadSample(f"'{key}' is {shown(record[key])}, and the answer one of them; expected a list, or one option a line")
        return texts_of(value)
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    given = next((record[key] for key in OPTION_KEYS if isinstance(record.get(key), list)), [])
    if is_whole and not any(isinstance(one, int | float) for one in given):
        return [answer_among(int(value), options)]
    return [answer_among(text, options) for text in texts_of(value)]


def numbered_answer(record: Any) -> tuple[int, int] | None:
    """(number, how many options there are) of a record whose answer is the number of an option, from 0 or from 1; None: it is not."""
    if not isinstance(record, dict):
        return None
    try:
        record = in_known_names(record, KNOWN)
        options = question_with_options(record, "")[1]
    except BadSample:
        return None
    value = next((record[key] for key in ANSWERS if is_present(record.get(key))), None) if options else None
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    number, names = A_NUMBER.fullmatch(str(value).strip()), {name for option in options for name in option}
    return (int(number[1]), len(options)) if number and number[0] not in names and number[1] not in names else None


def how_answered(record: Any) -> str | None:
    """How an answer that is no plain text is read, in words; None: it is one."""
    if not isinstance(record, dict):
        return None
    if numbered_answer(record) is not None:
        return "the number of an option, counted from 0"
    value = next((record[key] for key in ANSWERS if is_present(record.get(key))), None)
    if isinstance(value, bool):
        return "true and false as yes and no"
    try:
        options = question_with_options(record, "")[1] if isinstance(value, str) else []
        said = answer_among(value.strip(), options) if options and isinstance(value, str) else ""
    except BadSample:
        return None
    return "other words than those of the options, as they stand" if said and all(said not in option for option in options) else None


def with_letter_from_one(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose answer is the number of an option, from 1, with the option's label in its place.

    Raises:
        BadSample: no option has that number.
    """
    found = numbered_answer(record)
    if found is None:
        return record
    record = in_known_names(record, KNOWN)
    options, number = question_with_options(record, "")[1], found[0]
    if not 1 <= number <= len(options) or not options[number - 1][1]:
        has = ", ".join(str(place) for place, (_, text) in enumerate(options, 1) if text)
        raise BadSample(f"the answer {number} is none of the options {has}, counted from 1")
    key = next(key for key in ANSWERS if is_present(record.get(key)))
    return {**record, key: options[number - 1][0]}


def answer_among(answer: str | int, options: Options) -> str:
    """The option's label where the answer is its number, from 0, or the option with its letter; everything else as it is.

    Raises:
        BadSample: the number of one option is the text of another, or no option has that number or letter.
    """
    texts, labels = [text for _, text in options], [label if text else "" for label, text in options]
    number = A_NUMBER.fullmatch(answer) if isinstance(answer, str) else None
    place = int(number[1]) if number else answer
    if number and answer in texts and answer not in labels and 0 <= place < len(texts) and texts[place] != answer:
        raise BadSample(
            f"the answer {answer} may be the option '{answer}' ({labels[texts.index(answer)]}), or the number of an option, from 0 "
            f"({labels[place]}); write the letter"
        )
    if isinstance(answer, str) and answer and (answer in texts or answer in labels):
        return answer
    if isinstance(answer, str) and (written := LETTERED.fullmatch(answer.strip())) and (written["label"], written["text"]) in options:
        return written["label"]
    if isinstance(answer, str) and (letter := A_LETTER.fullmatch(answer.strip())) and letter[1].upper() in labels:
        return letter[1].upper()
    if isinstance(place, int) and str(place) in labels:
        return str(place)
    if isinstance(place, int) and 0 <= place < len(labels) and labels[place]:
        return labels[place]
    if isinstance(place, int) or (re.fullmatch("[A-Z]", answer) and all(label in LETTERS for label in labels)):
        has = ", ".join(label for label in labels if label)
        raise BadSample(
            f"the answer {str(answer)[:40]} is none of the options {has}, nor the number of one, from 0; write the letter "
            "(`data pack --options-from 1` counts from 1)"
        )
    return answer


def _letter_keys(record: dict[str, Any]) -> dict[str, str]:
    """Keys of options of their own by letter: `A`, `B`, ..., or `option_a`, `choice_B`; from A to the last that says something, two or
    more of them; "" for a letter that is left out."""
    found: dict[str, str] = {}
    for key in record:
        match = LETTER_KEY.fullmatch(key) if isinstance(key, str) and (len(key) > 1 or key.isupper()) else None
        if match:
            letter = match[1].upper()
            found[letter] = key if letter not in found or not texts_of(record[found[letter]]) else found[letter]
    used = [letter for letter, key in found.items() if texts_of(record[key])]
    if len(used) < 2 or "A" not in found:
        return {}
    return {letter: found.get(letter, "") for letter in LETTERS[: LETTERS.index(max(used)) + 1]}


def _value(value: Any) -> Any:
    """Options as a table's cell has them: a list written as a text, or one option a line."""
    if not isinstance(value, str):
        return value
    lines = [line for line in value.splitlines() if line.strip()]
    found = parsed(value)
    return found if isinstance(found, list | tuple | dict) else lines if len(lines) > 1 else None


def _words(value: Any) -> str:
    """The text of one option; empty where it has none."""
    return next(iter(texts_of(value)), "")


def _options(value: Any) -> Options:
    """Of a list of texts, a list of {label, text}, {"A": ..., "B": ...} or {"label": [...], "text": [...]}."""
    if isinstance(value, dict):
        names, words = (next((value[key] for key in keys if isinstance(value.get(key), list)), None) for keys in (NAME_KEYS, WORD_KEYS))
        if words is not None:
            return _labelled([_words(item) for item in words], names)
        items = {key: _words(item) for key, item in value.items() if isinstance(key, str)}
        return _labelled(list(items.values()), list(items))
    if not isinstance(value, list | tuple):
        return []
    if value and all(isinstance(item, dict) and len(item) == 1 for item in value):  # [{"A": "cat"}, {"B": "dog"}]
        return _options({key: text for item in value for key, text in item.items()})
    names = [next((item[key] for key in NAME_KEYS if key in item), None) if isinstance(item, dict) else None for item in value]
    words = [next((item[key] for key in WORD_KEYS if texts_of(item.get(key))), item) if isinstance(item, dict) else item for item in value]
    return _labelled([_words(word) for word in words], names)


def _labelled(texts: list[str], names: Any = None) -> Options:
    """With the labels that they have, each another, else by letters.

    Raises:
        BadSample: there are more than letters.
    """
    names = [str(name).strip() for name in names] if isinstance(names, list) and len(names) == len(texts) and None not in names else []
    written = [LETTERED.fullmatch(text) for text in texts]
    labels = [match["label"] for match in written if match]
    if labels and len(labels) == sum(map(bool, texts)) and _follow(labels, [number for number, text in enumerate(texts) if text]):
        return [(match["label"], match["text"].strip()) if match else ("", "") for match in written]
    if not (names and all(re.fullmatch(r"[A-Z]|[a-z]|\d{1,2}", name) for name in names) and len(set(names)) == len(names)):
        if len(texts) > len(LETTERS):
            raise BadSample(f"a question has {len(texts)} options; there are letters for {len(LETTERS)}")
        names = list(LETTERS[: len(texts)])
    return list(zip(names, texts, strict=True))


def _follow(labels: list[str], places: list[int]) -> bool:
    """A, B, C or 1, 2, 3, also with the places left out that are empty: letters of a list, not the first words of its texts."""
    lists = [list(LETTERS[: len(labels)]), [LETTERS[place] for place in places if place < len(LETTERS)]]
    return labels in (*lists, *([str(start + number) for number in range(len(labels))] for start in (0, 1)))


def _lists(question: str, options: Options) -> bool:
    """Whether every option stands in the question behind its own label."""
    return all(re.search(rf"(?:^|[\s(\[]){re.escape(label)}[.):\]]\s*{re.escape(text)}", question) for label, text in options if text)
