"""Thoughts between tags in what an assistant says: `<think>...</think>` before its words."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

OPENING = re.compile(r"\s*(?:<think>)?\s*")
CLOSING = "</think>"


def with_reasoning_apart(message: dict[str, Any]) -> dict[str, Any]:
    """A turn that thinks between tags, with its thought in `reasoning_content`."""
    place = next((number for number, part in enumerate(message["content"]) if "text" in part), None)
    if message["role"] != "assistant" or place is None or message.get("reasoning_content"):
        return message
    words = message["content"][place]["text"]
    thought = thought_of(words)
    if thought is None or ("<think>" not in thought.before and "\n" not in thought.behind):  # a sentence about the tag
        return message
    content = [*message["content"]]
    content[place] = {**content[place], "text": thought.rest}
    return {**message, "content": content, **({"reasoning_content": thought.words} if thought.words else {})}


class Thought(NamedTuple):
    """An answer that thinks between tags, in four pieces."""

    before: str
    words: str
    """Without spaces around."""
    behind: str
    rest: str


def thought_of(text: str) -> Thought | None:
    """The thought that an answer begins with; None: there is none. Without a regular expression over all of it, which would take time
    quadratic in its spaces."""
    end = text.find(CLOSING)
    opening = OPENING.match(text) if end >= 0 else None
    if opening is None:
        return None
    start = opening.end()
    words = text[start:end].rstrip()
    rest = text[end + len(CLOSING) :].lstrip()
    return Thought(text[:start], words, text[start + len(words) : len(text) - len(rest)], rest)


def has_reasoning(message: dict[str, Any]) -> bool:
    """Whether a turn thinks before it speaks, in `reasoning_content` or between tags."""
    if str(message.get("reasoning_content") or "").strip():
        return True
    thought = thought_of(next((part["text"] for part in message["content"] if "text" in part), ""))
    return bool(thought and thought.words)


def without_reasoning(text: str) -> str:
    """What an answer says behind its thought."""
    return text.rsplit(CLOSING, 1)[-1].strip()


def without_lost_thought(message: dict[str, Any], text: str) -> dict[str, Any]:
    """A turn without the `reasoning_content` that the template left out."""
    is_lost = str(message.get("reasoning_content") or "").strip() not in text
    return {key: value for key, value in message.items() if key != "reasoning_content"} if is_lost else message
