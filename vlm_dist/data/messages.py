"""A record's turns -> messages with typed parts, in the one form that everything behind reads."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from vlm_dist.data.json_text import read_object
from vlm_dist.data.layout_turns import ROLES, unread_in
from vlm_dist.data.thoughts import CLOSING, TAG, oddities
from vlm_dist.errors import BadSample

HANDED_ON = ("reasoning_content", "tool_calls", "tool_call_id", "name")
"""Keys of a turn that the chat template gets as they are."""
WEIGHTS = ("weight", "loss", "train", "trainable", "is_trainable", "training", "train_on", "loss_weight", "loss_scale", "loss_mask")
"""Keys of a turn that say how much it counts: a number, or false and true for 0 and 1 (OpenAI's, ms-swift's, Axolotl's, Megatron's and
others' names)."""
UNCLEAR = ("mask", "masked", "loss_masked", "ignore", "train_detail", "training_detail")
"""Keys of a turn that mean learnt in one library and left out in another, or name a part of its words."""
LARGEST_WEIGHT = 1000.0
WEIGHT_DIGITS = 6  # what is smaller is nothing
PICTURE_PARTS = ("image", "image_url", "input_image")
VIDEO_PARTS = ("video", "video_url", "input_video")
MARKERS, MARKERS_OF_ANSWERS = re.compile("(<image>|<video>)"), re.compile("(<image>)")  # an answer about a web page may say <video>
BESIDE_MARKER = re.compile(r"\n?<(?:image|video)>\n?")
TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(turns: Any) -> list[dict[str, Any]]:
    """A list of turns -> messages: `role`, `content` (parts of type image or video, or text with `text`), and where the turn has them
    `weight` and what `HANDED_ON` names.

    Raises:
        BadSample: it is no list of turns, or a turn has an unknown role or part, or an impossible weight.
    """
    if not isinstance(turns, list) or not turns:
        raise BadSample("json: expected a list of turns")
    return [_message(turn) for turn in turns]


def check_messages(messages: list[dict[str, Any]], num_pictures: int, found: str = "", num_videos: int = 0) -> None:
    """Place the pictures and videos that the text does not place, and see that messages agree with them.

    Args:
        found: what the sample consists of, for the error message.

    Raises:
        BadSample: they do not, or no assistant speaks.
    """
    for kind, words, count in (("video", "videos", num_videos), ("image", "pictures", num_pictures)):
        _place(messages, kind, count)
        asked = sum(part["type"] == kind for message in messages for part in message["content"])
        if asked != count:
            hint = f"; <{kind}> in a text, and a part of type {kind}, each stand for one" if asked > count else ""
            raise BadSample(f"the text speaks of {asked} {words}, the sample has {count}{found}{hint}")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadSample("no assistant turn to learn from")
    if not any(message["role"] == "assistant" and says_something(message) for message in messages):
        raise BadSample("the assistant says nothing: every answer is empty")


def says_something(message: dict[str, Any]) -> bool:
    """Whether there is anything of an assistant's turn to learn."""
    spoken = any(part.get("text", "").replace(TAG, "").replace(CLOSING, "").strip() for part in message["content"])
    return spoken or bool(message.get("tool_calls")) or bool(message.get("reasoning_content", "").strip())


def unread_keys(turns: Any) -> set[str]:
    """Keys of turns that `read_messages` looks past."""
    known = {"role", "from", "content", "value", *HANDED_ON, *WEIGHTS}
    found = {str(key)[:60] for turn in _objects(turns) for key, value in turn.items() if key not in known and value is not None}
    found |= {key for turn in _objects(turns) for key in _contradicting(turn)}
    others = (turn for turn in _objects(turns) if not _speaks(turn))
    return found | {f"{key} (of a turn that is no assistant's)" for turn in others for key in WEIGHTS if turn.get(key)}


def _contradicting(turn: dict[str, Any]) -> list[str]:
    """Keys that say again who speaks, or what, and say something else than those that are read."""
    roles = [ROLES.get(name.strip().casefold()) for key in ("role", "from") if isinstance(name := turn.get(key), str)]
    words = [turn[key] for key in ("content", "value") if turn.get(key)]
    return ["from"] * (len(set(roles)) > 1) + ["value"] * (len(words) > 1 and words[0] != words[1] and isinstance(words[0], str))


def unread_part_keys(turns: Any) -> set[str]:
    """Keys of the typed parts of turns that `read_messages` looks past."""
    parts = (part for turn in _objects(turns) for part in _objects(turn.get("content", turn.get("value"))))
    return {str(key)[:60] for part in parts for key in unread_in(part)}


def weighing_keys(turns: Any) -> set[str]:
    """Keys by which assistants' turns say that they count less or more than once."""
    weighed = (turn for turn in _objects(turns) if _speaks(turn))
    return {key for turn in weighed for key in WEIGHTS if turn.get(key) is not None and turn[key] != 1}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list | tuple) else []


def line_breaks_lost(turns: Any) -> set[str]:
    """The line breaks around texts that `read_messages` takes away, but for one between a text and the marker of its picture."""
    found = set()
    for turn in _objects(turns):
        text = turn.get("content", turn.get("value"))
        words = BESIDE_MARKER.sub("", text) if isinstance(text, str) and "\n" in text else ""
        if words.strip() and words != words.strip("\n"):
            found.add("line breaks" if _speaks(turn) else "line breaks of questions")
    return found


def odd_thoughts(turns: Any) -> set[str]:
    """What in assistants' words looks like a thought and is no whole one."""
    return {oddity for is_said, text in texts_in(turns) if is_said for oddity in oddities(text)}


def texts_in(turns: Any) -> Iterator[tuple[bool, str]]:
    """(whether an assistant says it, text) of each turn."""
    for turn in _objects(turns):
        text = turn.get("content", turn.get("value"))
        yield _speaks(turn), text if isinstance(text, str) else "".join(str(part.get("text") or "") for part in _objects(text))


def _speaks(turn: dict[str, Any]) -> bool:
    role = turn.get("role", turn.get("from"))
    return isinstance(role, str) and ROLES.get(role.strip().casefold()) == "assistant"


def joined(content: list[dict]) -> list[dict]:
    """Texts that follow one another in one part."""
    made: list[dict] = []
    for part in content:
        if "text" in part and made and "text" in made[-1]:
            made[-1] = {**part, "text": made[-1]["text"] + part["text"]}
        else:
            made.append(part)
    return made


def as_templates_take_it(message: dict[str, Any]) -> dict[str, Any]:
    """A tool's words as one text, as templates of language models take them; no weight."""
    given = {key: value for key, value in message.items() if key != "weight"}
    if message["role"] == "tool" and all("text" in part for part in message["content"]):
        given["content"] = "".join(part["text"] for part in message["content"])
    return given


def text_of(value: Any) -> str:
    """A text that can be written down.

    Raises:
        BadSample: it has half of a surrogate pair, which no encoding has.
    """
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadSample(f"json: half a character ({value[error.start]!a}, a lone surrogate) in a text; write the text anew") from None
    return value


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadSample(f"json: a turn is a {type(turn).__name__}; expected an object with 'role' and 'content'")
    role_key, content_key = (next((key for key in keys if key in turn), keys[0]) for keys in (("role", "from"), ("content", "value")))
    role = turn.get(role_key)
    role = ROLES.get(role.strip().casefold()) if isinstance(role, str) else None
    if role is None:
        raise BadSample(f"json: a turn's '{role_key}' is {str(turn.get(role_key))[:60]!r}; expected user, assistant, system or tool")
    message: dict[str, Any] = {"role": role, "content": _parts(turn.get(content_key), content_key, role == "assistant" and turn)}
    message |= {key: turn[key] for key in HANDED_ON if turn.get(key) is not None}
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(turn["tool_calls"])
    if not isinstance(message.get("reasoning_content", ""), str):
        raise BadSample("json: a turn's 'reasoning_content' is no text")
    if role == "assistant" and (weight := _weight(turn)) != 1.0:
        message["weight"] = weight
    return message


def _parts(content: Any, key: str, assistant: Any) -> list[dict[str, str]]:
    if isinstance(content, str):
        return _split_markers(text_of(content), MARKERS_OF_ANSWERS if assistant else MARKERS)
    if content is None and assistant and (assistant.get("tool_calls") or assistant.get("reasoning_content")):
        return []
    if not isinstance(content, list):
        raise BadSample(f"json: a turn's '{key}' is neither text nor a list of parts")
    return [_part(part) for part in content]


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """With their arguments as objects, as templates take them; OpenAI's are objects written as a text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadSample("json: a turn's 'tool_calls' is no list of objects")
    made = []
    for call in calls:
        inner = call.get("function", call)
        if isinstance(inner, dict) and isinstance(inner.get("arguments"), str):
            try:
                inner = {**inner, "arguments": read_object(inner["arguments"])}
            except (ValueError, RecursionError):
                raise BadSample("json: the arguments of a tool call are no JSON") from None
            call = {**call, "function": inner} if "function" in call else inner
        made.append(call)
    return made


def _weight(turn: dict[str, Any]) -> float:
    """0 ... `LARGEST_WEIGHT`; of several keys the product, so that each can switch a turn off."""
    product = 1.0
    unclear = next((key for key in UNCLEAR if isinstance(turn.get(key), bool | int | float | list) and turn[key] != []), None)
    if unclear is not None:
        raise BadSample(
            f"json: a turn's '{unclear}' is {str(turn[unclear])[:40]!r}, which may mean learnt or left out; write 'train': true or false"
        )
    for key in WEIGHTS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or not math.isfinite(value) or not 0 <= value <= LARGEST_WEIGHT:
            raise BadSample(f"json: a turn's '{key}' is {str(value)[:40]!r}; expected true, false, or 0 to {LARGEST_WEIGHT:g}")
        product *= float(value)
    return round(product, WEIGHT_DIGITS)


def _split_markers(text: str, markers: re.Pattern[str]) -> list[dict[str, str]]:
    """LLaVA writes `<image>` in the text where a picture stands, and `<video>` where a video does."""
    parts: list[dict[str, str]] = []
    for piece in markers.split(text):
        if markers.fullmatch(piece):
            parts.append({"type": piece[1:-1]})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts


def _part(part: Any) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": text_of(part)}
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in PICTURE_PARTS:
        return {"type": "image"}
    if isinstance(kind, str) and kind in VIDEO_PARTS:
        return {"type": "video"}
    if isinstance(part, dict) and isinstance(part.get("text"), str) and (kind is None or kind in TEXT_PARTS):
        return {"type": "text", "text": text_of(part["text"])}
    raise BadSample(f"json: a part of type {str(kind)[:60]!r}; expected image, video, or text with 'text'")


def _place(messages: list[dict[str, Any]], kind: str, count: int) -> None:
    """Pictures or videos that the text does not place stand at the start of the first user turn, as most data sets mean it; where no user
    speaks, of the first turn."""
    placed = any(part["type"] == kind for message in messages for part in message["content"])
    turns = [message for role in ("user", "assistant") for message in messages if message["role"] == role]
    if count and not placed and turns:
        turns[0]["content"][:0] = [{"type": kind} for _ in range(count)]
