"""Lists of turns as people write them -> turns one by one. No file is opened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_dist.data.layout_values import parsed, shown
from vlm_dist.errors import BadSample

ROLE_KEYS = ("role", "from", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text", "parts", "message")
TURN_PICTURES = ("images", "image")  # of a turn itself, as Ollama's
ASKED = ("user", "human", "question", "query", "prompt", "q", "instruction", "input")
SAID = ("assistant", "gpt", "answer", "response", "completion", "a", "output")


def spread(turns: Any) -> Iterator[dict[str, Any]]:
    """Pairs -> two turns each; [question, answer] pairs, objects with both, texts by turns.

    Raises:
        BadSample: no list of turns.
    """
    if not isinstance(turns, list | tuple) or not turns:
        raise BadSample("json: expected a list of turns")
    if all(isinstance(turn, str) for turn in turns):
        yield from ({"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(turns))
        return
    for turn in turns:
        pair = pair_of(turn)
        if pair is not None:
            asked, said, rest = pair
            if isinstance(system := rest.pop("system", None), str):
                yield from [{"role": "system", "content": system}] if system.strip() else []
            yield {"role": "user", "content": asked, **{key: rest.pop(key) for key in TURN_PICTURES if key in rest}}
            yield {"role": "assistant", "content": said, **rest}
        elif isinstance(turn, dict):
            yield turn
        else:
            raise BadSample(f"json: a turn is {shown(turn)}; expected an object such as {{'role': 'user', 'content': ...}}")


def pair_of(turn: Any) -> tuple[Any, Any, dict[str, Any]] | None:
    """(asked, said, the other keys) of [q, a] or {"user": q, "assistant": a}; None: it is a turn."""
    if isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
        return turn[0], turn[1], {}
    if not isinstance(turn, dict) or any(turn.get(key) is not None for key in ("role", "from")):
        return None
    asked, said = key_of(turn, ASKED, None), key_of(turn, SAID, None)
    if asked is None or said is None or turn[asked] is None or turn[said] is None:
        return None
    words, used = turn[asked], {asked, said}
    if asked == "instruction" and isinstance(words, str) and isinstance(turn.get("input"), str):  # Alpaca's
        words, used = "\n".join(text for text in (words, turn["input"]) if text.strip()), {*used, "input"}
    return words, turn[said], {key: value for key, value in turn.items() if value is not None and key not in used}


def looks_like_turns(value: Any) -> bool:
    """Whether a value is a list of turns (or a text that holds one, as a table's cell)."""
    if value is None:
        return False
    value = unpacked(value)
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], dict):
        return False
    turn = value[0]
    return pair_of(turn) is not None or (
        any(isinstance(turn.get(key), str) for key in ROLE_KEYS)
        and any(key in turn for key in (*CONTENT_KEYS, "tool_calls", "function_call"))
    )


def is_one_talk(value: Any) -> bool:
    """Whether a list in a file is one conversation, not a list of records: its objects have a speaker, and no picture of their own."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return False
    return all(
        any(isinstance(turn.get(key), str) for key in ("role", "from")) and any(key in turn for key in (*CONTENT_KEYS, "tool_calls"))
        for turn in value
    ) and not any(key in turn for turn in value for key in ("image", "images"))


def unpacked(value: Any) -> Any:
    """A cell of a table that holds a list as text -> the list; columns of turns, {"from": [...], "value": [...]}, -> turns."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        found = parsed(value)
        return found if isinstance(found, list) else value
    if isinstance(value, dict) and len(value) > 1 and all(isinstance(column, list) for column in value.values()):
        columns = {key: column for key, column in value.items() if len(column) == max(map(len, value.values()))}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return rows if columns.keys() == value.keys() and looks_like_turns(rows) else value
    return [value] if isinstance(value, dict) and pair_of(value) is not None else value


def key_of(turn: dict[str, Any], names: tuple[str, ...], otherwise: str | None = "") -> Any:
    """The first key that says something, else the first that is there."""
    found = next((key for key in names if turn.get(key) is not None), None) or next((key for key in names if key in turn), None)
    return found or (names[0] if otherwise == "" else None)
