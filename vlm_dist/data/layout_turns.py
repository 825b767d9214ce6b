"""Lists of turns as people write them -> turns of one form. No file is opened."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_dist.data.layout_values import SOURCE_KEYS, is_present, parsed, shown, source_of, texts_of
from vlm_dist.errors import BadSample

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "question", "instruction", "customer", "client", "inputs", "input"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "model", "bot", "chatbot", "ai", "llm", "vlm", "chatgpt", "gpt4", "gpt-4", "gpt-4v", "gpt4v", "bing", "bard",
         "claude", "gemini", "qwen", "llava", "agent", "answer", "response", "output", "function_call", "tool_call", "tool_calls"),
        "assistant",
    ),
    **dict.fromkeys(("system", "developer", "system_prompt"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "observations", "tool_response", "function_response", "ipython"), "tool"),
}  # fmt: skip
ROLE_KEYS = ("role", "from", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text", "parts", "message")
CALLS = ("function_call", "tool_call", "tool_calls")  # speakers whose words are a call
ASKED = ("user", "human", "question", "query", "prompt", "q", "instruction", "input")
SAID = ("assistant", "gpt", "answer", "response", "completion", "a", "output")
IMAGE_PARTS = ("image", "image_url", "input_image", "img", "picture")
VIDEO_PARTS = ("video", "video_url", "input_video")
TEXT_PARTS = ("text", "input_text", "output_text")
UNNAMED_PARTS = ("text", *IMAGE_PARTS, *VIDEO_PARTS, "inline_data", "inlineData")  # what a part without a type is known by
PART_KEYS = frozenset({"type", "index", *UNNAMED_PARTS, *SOURCE_KEYS, "media_type", "mime_type"})
"""What is read of a part."""
OTHER_MARKERS = re.compile(
    r"<\|vision_start\|><\|image_pad\|><\|vision_end\|>|<\|image\|>|<start_of_image>|<ImageHere>|<image_placeholder>|<image_here>|\[IMG\]"
    r"|<(?:IMAGE|Image)>"
)
"""How other trainers write `<image>`; read where there are as many as pictures."""
NUMBERED_MARKER = re.compile(r"<\|?image[ _]?(\d{1,3})\|?>")
_QWEN_OR_LLAVA = r"<img>(?P<path>[^<>\n]{1,4096})</img>|<image>"
_MARKERS_WITHOUT_NUMBERS = re.compile(_QWEN_OR_LLAVA)
_MARKERS = re.compile(_QWEN_OR_LLAVA + r"|<\|?image[ _]?(?P<number>\d{1,3})\|?>")
MARKER = "<image>"


class Turns:
    """Turns in one form: role of user, assistant, system or tool, content of text or typed parts; every other key as it was.

    Args:
        turns: a list of turns.
        column: the pictures that the record names beside the turns.
        names: the placeholder that stands for each of them in the text, where they have some of their own.

    Raises:
        BadSample: no list of turns, or a turn with an unknown role or part.
    """

    def __init__(self, turns: Any, column: list[Any] | None = None, names: Sequence[str] = ()):
        self.images: list[Any] = []
        """Pictures in order of appearance."""
        self.videos: list[Any] = []
        """Videos that typed parts hold, in order of appearance."""
        self._own: list[Any] = []  # of each place for a picture: its own source, or None
        self._numbers: list[int | None] = []  # of each place: the number of the picture that its marker names
        column, turns = list(column or []), list(spread(turns))
        self._names = {name: number for number, name in enumerate(names, 1)}
        self._named = re.compile("|".join(map(re.escape, sorted([*names, MARKER], key=len, reverse=True)))) if names else None
        if self._named is None and column and not any(MARKER in text for text in _texts(turns)):
            found = [found for text in _texts(turns) for found in OTHER_MARKERS.findall(text)]
            self._named = OTHER_MARKERS if len(found) == len(column) else None
        self._marker = _MARKERS if _numbers_can_be_read(turns, len(column)) else _MARKERS_WITHOUT_NUMBERS
        self.turns = [self._turn(turn) for turn in turns]
        self._settle(column)

    def _turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        role_key = _key(turn, ROLE_KEYS)
        name = turn.get(role_key)
        role = ROLES.get(name.strip().rstrip(":").casefold()) if isinstance(name, str) else None
        if role is None:
            raise BadSample(f"json: a turn's '{role_key}' is {shown(name)}; expected one of user, assistant, system, tool, human, gpt")
        content_key = _key(turn, CONTENT_KEYS)
        rest = {key: value for key, value in turn.items() if value is not None and key not in (role_key, content_key)}
        if "function_call" in rest and "tool_calls" not in rest:
            rest["tool_calls"] = [{"type": "function", "function": rest.pop("function_call")}]
        for other in ("reasoning", "thinking"):
            if isinstance(rest.get(other), str) and "reasoning_content" not in rest:
                rest["reasoning_content"] = rest.pop(other)
        content = turn.get(content_key)
        if isinstance(name, str) and name.strip().casefold() in CALLS and "tool_calls" not in rest:
            calls = _calls(content)
            if calls:
                content, rest["tool_calls"] = None, calls
        return {"role": role, "content": self._content(content, content_key, role, rest), **rest}

    def _content(self, content: Any, key: str, role: str, rest: dict[str, Any]) -> Any:
        if content is None and role == "assistant" and (rest.get("tool_calls") or rest.get("reasoning_content")):
            return None
        if isinstance(content, int | float):
            content = next(iter(texts_of(content)), "")
        if isinstance(content, str):
            return self._text(content, role)
        if isinstance(content, dict) and (set(content) & {"type", "text", *IMAGE_PARTS}):
            content = [content]
        if isinstance(content, dict) and isinstance(content.get("parts"), list):
            content = content["parts"]
        if isinstance(content, list) and content and role == "tool" and not all(map(_is_part, content)):
            return _as_json(content)
        if isinstance(content, list):
            return [self._part(part, role) for part in content]
        if role == "tool" and content is not None:
            return _as_json(content)
        raise BadSample(f"json: a turn's '{key}' is neither text nor a list of parts")

    def _text(self, text: str, role: str) -> str:
        """Text with `<image>` where a picture stands, as LLaVA writes it; Qwen's `<img>PATH</img>` and `<image 1>` become that."""
        if self._named is not None:
            for found in self._named.findall(text):
                self._place(None, self._names.get(found))
            return self._named.sub(MARKER, text)
        if role != "user" or ("<i" not in text and "<|i" not in text):
            for _ in range(text.count(MARKER)):
                self._place()
            return text

        def place(match: re.Match[str]) -> str:
            number = match.groupdict().get("number")
            self._place(match["path"], int(number) if number else None)
            return MARKER

        return self._marker.sub(place, text)

    def _place(self, source: Any = None, number: int | None = None) -> None:
        self._own.append(source)
        self._numbers.append(number)

    def _part(self, part: Any, role: str) -> dict[str, Any]:
        """Typed, with the keys that nothing reads."""
        if isinstance(part, str):
            return {"type": "text", "text": self._text(part, role)}
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None and isinstance(part, dict):
            kind = next((key for key in UNNAMED_PARTS if is_present(part.get(key))), None)
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"], **unread_in(part)}
        if kind in (*IMAGE_PARTS, "inline_data", "inlineData"):
            own = {key: value for key, value in part.items() if key in PART_KEYS and key not in ("type", "text", "index")}
            index = part.get("index")  # of the column, from 0
            number = index + 1 if isinstance(index, int) and not isinstance(index, bool) else None
            self._place(source_of(own.get("inline_data") or own.get("inlineData") or own), number)
            return {"type": "image", **unread_in(part)}
        if kind in VIDEO_PARTS:
            own = source_of(next((part[key] for key in VIDEO_PARTS if is_present(part.get(key))), None))
            self.videos += [own] if own is not None else []
            return {"type": "video", **unread_in(part)}
        raise BadSample(f"json: a part of type {shown(kind)}; expected image, video, or text with 'text'")

    def _settle(self, column: list[Any]) -> None:
        """The pictures of each place: the column's where it has one for each, else the place's own, else the column's next."""
        numbers = [number for number in self._numbers if number is not None]
        if numbers and len(numbers) == len(self._own) and all(0 < number <= len(column) for number in numbers):
            unnamed = [source for number, source in enumerate(column, 1) if number not in numbers]
            self.images = [column[number - 1] for number in numbers] + unnamed
            return
        if len(column) == len(self._own):
            self.images = column
            return
        left = iter(column)
        for source in self._own:
            source = source if source is not None else next(left, None)
            if source is not None:
                self.images.append(source)
        self.images += left


def unread_in(part: dict[str, Any]) -> dict[str, Any]:
    """What of a part nothing reads."""
    return {key: value for key, value in part.items() if key not in PART_KEYS and value is not None}


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
            yield {"role": "user", "content": asked}
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
    asked, said = _key(turn, ASKED, None), _key(turn, SAID, None)
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


def _texts(turns: list[dict[str, Any]]) -> list[str]:
    return [turn[key] for turn in turns for key in CONTENT_KEYS if isinstance(turn.get(key), str)]


def _numbers_can_be_read(turns: list[dict[str, Any]], count: int) -> bool:
    """Whether `<image 2>` and its like name pictures of the record; where it has none of its own, whether they stand in order."""
    numbers = [int(number) for text in _texts(turns) for number in NUMBERED_MARKER.findall(text)]
    return all(0 < number <= count for number in numbers) if count else numbers == list(range(1, len(numbers) + 1))


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


def _key(turn: dict[str, Any], names: tuple[str, ...], otherwise: str | None = "") -> Any:
    """The first key that says something, else the first that is there."""
    found = next((key for key in names if turn.get(key) is not None), None) or next((key for key in names if key in turn), None)
    return found or (names[0] if otherwise == "" else None)


def _calls(content: Any) -> list[dict[str, Any]]:
    """What a speaker "function_call" says -> OpenAI's tool_calls; empty: it is no call."""
    said = parsed(content) if isinstance(content, str) else content
    calls = said if isinstance(said, list) else [said]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [{"type": "function", "function": call} for call in calls]


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and part.get("type") in (*TEXT_PARTS, *IMAGE_PARTS))


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError, TypeError):
        raise BadSample("json: a tool's answer cannot be written as text") from None
