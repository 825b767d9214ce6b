"""Thoughts between tags in what an assistant says: `<think>...</think>` before its words."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

OPENING = re.compile(r"\s*(?:<think>)?\s*")
TAG, CLOSING = "<think>", "</think>"


def with_reasoning_apart(message: dict[str, Any]) -> dict[str, Any]:
    """A turn, whose texts stand in one part, that thinks between tags, with its thought in `reasoning_content`. Further tags are words: a
    template that is given a thought, be it empty, does not look for one in them."""
    place = next((number for number, part in enumerate(message["content"]) if "text" in part), None)
    if message["role"] != "assistant" or place is None:
        return message
    words, given = message["content"][place]["text"], message.get("reasoning_content")
    thought = None if given else leading_thought(words)
    rest = thought.rest if thought else words
    if thought is None and CLOSING not in rest:
        return message
    content = [*message["content"]]
    content[place] = {**content[place], "text": rest}
    apart = given or (thought.words if thought else "")
    return {**message, "content": content, **({"reasoning_content": apart} if apart or CLOSING in rest else {})}


class Thought(NamedTuple):
    """An answer that thinks between tags, in four pieces."""

    before: str
    words: str
    """Without spaces around."""
    behind: str
    rest: str


def thought_of(text: str) -> Thought | None:
    """What stands before the first closing tag of an answer; None: there is no such tag. Without a regular expression over all of it, which
    would take time quadratic in its spaces."""
    end = text.find(CLOSING)
    opening = OPENING.match(text) if end >= 0 else None
    if opening is None:
        return None
    start = opening.end()
    words = text[start:end].rstrip()
    rest = text[end + len(CLOSING) :].lstrip()
    return Thought(text[:start], words, text[start + len(words) : len(text) - len(rest)], rest)


def leading_thought(text: str) -> Thought | None:
    """The thought that an answer begins with: between both tags, or closed by a tag on the end of a line, as where the chat template writes
    the opening one; None: there is none, and a closing tag is a word of its."""
    thought = thought_of(text)
    is_one = thought is not None and (TAG in thought.before or "\n" in thought.behind or not thought.words)
    return thought if is_one else None


def oddities(text: str) -> list[str]:
    """What of an answer looks like a thought and is no whole one, in words."""
    if TAG not in text and CLOSING not in text:
        return []
    thought = leading_thought(text)
    rest = thought.rest if thought else text
    found = [f"{tag} within the words" for tag in (TAG, CLOSING) if tag in rest]
    if rest.lstrip().startswith(TAG) and CLOSING not in rest:
        found = [f"{TAG} without its end"]
    return [*found, *(["a thought without words behind it"] if thought and thought.words and not rest.strip() else [])]


def has_reasoning(message: dict[str, Any]) -> bool:
    """Whether a turn thinks before it speaks, in `reasoning_content` or between tags."""
    if str(message.get("reasoning_content") or "").strip():
        return True
    thought = leading_thought("".join(part["text"] for part in message["content"] if "text" in part))
    return bool(thought and thought.words)


def without_thought(text: str) -> str:
    """What an answer of a data set says behind its thought."""
    thought = leading_thought(text)
    return (thought.rest if thought else text).strip()


def without_generated_thought(text: str, truth: str) -> str:
    """What a generated answer says behind its thought, whose beginning may stand in the prompt; where nothing stands behind, all of it.

    Args:
        truth: the right answer, without its thought; closing tags in it are words.
    """
    if CLOSING in truth:
        return without_thought(text) or text.strip()
    return text.rsplit(CLOSING, 1)[-1].strip() or text.strip()


def without_lost_thought(message: dict[str, Any], text: str) -> dict[str, Any]:
    """A turn without the `reasoning_content` that the template left out."""
    thought = str(message.get("reasoning_content") or "").strip()
    return {key: value for key, value in message.items() if key != "reasoning_content"} if thought and thought not in text else message
