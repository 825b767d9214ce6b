"""Lists of turns as people write them -> turns of one form. No file is opened."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

from vlm_dist.data.layout_lists import CONTENT_KEYS, ROLE_KEYS, TURN_PICTURES, key_of, spread
from vlm_dist.data.layout_values import NAMES_PICTURE, SOURCE_KEYS, is_present, parsed, shown, source_of, sources_in, texts_of
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
CALLS = ("function_call", "tool_call", "tool_calls")  # speakers whose words are a call
IMAGE_PARTS = ("image", "image_url", "input_image", "img", "picture")
VIDEO_PARTS = ("video", "video_url", "input_video")
THOUGHTS = ("thinking", "reasoning")
TEXT_PARTS = ("text", "input_text", "output_text")
UNNAMED_PARTS = ("text", *IMAGE_PARTS, *VIDEO_PARTS, "inline_data", "inlineData")  # what a part without a type is known by
PART_KEYS = frozenset({"type", "index", *UNNAMED_PARTS, *SOURCE_KEYS, "media_type", "mime_type"})
"""What is read of a part."""
SPAN_KEYS = {"start": "start", "video_start": "start", "end": "end", "video_end": "end"}
"""Keys of a part of a video that say which seconds of it are meant; those with `video_` are Qwen's."""
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
        self.spans: list[dict[str, Any]] = []
        """`start` and `end` that typed parts of videos have, in order of appearance."""
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
        role_key = key_of(turn, ROLE_KEYS)
        name = turn.get(role_key)
        role = ROLES.get(name.strip().rstrip(":").casefold()) if isinstance(name, str) else None
        if role is None:
            raise BadSample(f"json: a turn's '{role_key}' is {shown(name)}; expected one of user, assistant, system, tool, human, gpt")
        content_key = key_of(turn, CONTENT_KEYS)
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
        if isinstance(content, list) and role == "assistant" and "reasoning_content" not in rest:
            content, thought = _without_thoughts(content)
            rest |= {"reasoning_content": thought} if thought else {}
        first, own = len(self._own), [source for key in TURN_PICTURES if key in rest for source in sources_in(rest.pop(key))]
        made = self._content(content, content_key, role, rest)
        return {"role": role, "content": self._with_own(made, first, own) if own else made, **rest}

    def _with_own(self, content: Any, first: int, own: list[Any]) -> Any:
        """A turn that holds pictures beside its words: they belong to its places for pictures; without any, they stand before the words."""
        places = [number for number in range(first, len(self._own)) if self._own[number] is None]
        if not places and len(self._own) == first:
            for source in own:
                self._place(source)
            words = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
            return [*({"type": "image"} for _ in own), *words]
        if len(places) != len(own):
            raise BadSample(f"json: a turn has {len(own)} pictures, and places for {len(places)}")
        for number, source in zip(places, own, strict=True):
            self._own[number] = source
        return content

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
        self.spans += [{}] * text.count("<video>") * (role != "assistant")
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
            self.spans.append(_span_of(part))
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
            other = next((pair for pair in zip(self._own, column, strict=True) if _are_others(*pair)), None)
            if other is not None:
                raise BadSample(
                    f"a turn has the picture {shown(other[0])}, the record {shown(other[1])} in its place; leave one of them out"
                )
            self.images = column
            return
        left = iter(column)
        for source in self._own:
            source = source if source is not None else next(left, None)
            if source is not None:
                self.images.append(source)
        self.images += left


def _are_others(own: Any, beside: Any) -> bool:
    """Whether two sources name files with different names."""
    names = [re.split(r"[/\\]", urllib.parse.unquote(one).strip())[-1] for one in (own, beside) if _is_path(one)]
    return len(names) == 2 and names[0] != names[1] and all(len(name) <= 200 and NAMES_PICTURE.search(name) for name in names)


def _is_path(source: Any) -> bool:
    return isinstance(source, str) and len(source) <= 4096 and "://" not in source[:12]


def _span_of(part: dict[str, Any]) -> dict[str, Any]:
    """`start` and `end` of a part of a video, or of the object in it that says which."""
    inner = next((part[key] for key in VIDEO_PARTS if isinstance(part.get(key), dict)), {})
    found: dict[str, Any] = {}
    for given in (part, inner):
        for key, name in SPAN_KEYS.items():
            if (value := given.get(key)) is None:
                continue
            if found.setdefault(name, value) != value:
                raise BadSample(f"json: a video's '{name}' is {shown(found[name])}, and its '{key}' {shown(value)}; leave one of them out")
    return found


def unread_in(part: dict[str, Any]) -> dict[str, Any]:
    """What of a part nothing reads."""
    known = PART_KEYS | SPAN_KEYS.keys() if part.get("type") in VIDEO_PARTS or "video" in part else PART_KEYS
    return {key: value for key, value in part.items() if key not in known and is_present(value)}


def _without_thoughts(parts: list[Any]) -> tuple[list[Any], str]:
    """Parts without those of type thinking, and what these say."""
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    thoughts = [text for part, kind in zip(parts, kinds, strict=True) if kind in THOUGHTS for text in texts_of(part.get(kind))]
    return [part for part, kind in zip(parts, kinds, strict=True) if kind not in THOUGHTS] if thoughts else parts, "\n".join(thoughts)


def _texts(turns: list[dict[str, Any]]) -> list[str]:
    return [turn[key] for turn in turns for key in CONTENT_KEYS if isinstance(turn.get(key), str)]


def _numbers_can_be_read(turns: list[dict[str, Any]], count: int) -> bool:
    """Whether `<image 2>` and its like name pictures of the record; where it has none of its own, whether they stand in order."""
    numbers = [int(number) for text in _texts(turns) for number in NUMBERED_MARKER.findall(text)]
    return all(0 < number <= count for number in numbers) if count else numbers == list(range(1, len(numbers) + 1))


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
