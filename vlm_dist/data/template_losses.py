"""What a chat template did not write of a conversation."""

from __future__ import annotations

from typing import Any

from vlm_dist.data.tally import Note
from vlm_dist.data.thoughts import without_thought
from vlm_dist.data.turns import Messages, names_of
from vlm_dist.errors import BadSample


def left_out(messages: Messages, text: str, tools: list[Any] | None) -> set[Note]:
    """What a template did not write into `text`, where a model can do without; else, as of words and tools, raises BadSample."""
    notes: set[Note] = set()
    for number, message in enumerate(messages):
        said = [part["text"] for part in message["content"] if part.get("text", "").strip()]
        lost = [one for one in said if one.strip() not in text]
        if lost and message["role"] == "system":
            notes.add(("template", "system turns"))
        elif lost and message["role"] == "assistant" and all(without_thought(one) in text for one in lost):
            notes.add(("template", "reasoning"))
        elif lost:
            how = "writes in other words" if message["role"] == "assistant" else "leaves out"
            raise BadSample(f"the chat template {how} what the {message['role']} says in turn {number}: {lost[0].strip()[:60]!r}")
        elif any(one not in text for one in said):
            notes.add(("stripped", "spaces and line breaks, by the chat template"))
        if any(name not in text for name in names_of(message.get("tool_calls"))):
            raise BadSample(f"the chat template leaves out the tool calls of turn {number}; use a model whose template takes tools")
        if str(message.get("reasoning_content") or "").strip() not in text:
            notes.add(("template", "reasoning"))
    if any(name not in text for name in names_of(tools)):
        raise BadSample("the chat template leaves out the tools; use a model whose template takes them")
    return notes
