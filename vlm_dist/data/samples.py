"""A tar sample's files -> one form: messages with typed parts, and the pictures in order of appearance.

Four forms are read (docs/data.md): `KEY.json` with "messages", with LLaVA's "conversations" or with "captions" (several of one
picture), and `KEY.txt` (a caption, as img2dataset writes). Pictures are `KEY.jpg|jpeg|png|webp`, or `KEY.0.jpg`, `KEY.1.jpg`, ... .
Members are read from memory and never unpickled; any other member is ignored.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from typing import Any

from vlm_dist.data.pictures import Size, decode_picture, decode_pixels, picture_size
from vlm_dist.errors import BadSample

PICTURE_MEMBER = re.compile(r"(?:(\d+)\.)?(?:jpg|jpeg|png|webp)$")
TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}  # key of a list of turns: a turn's own keys
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass
class Sample:
    """One conversation about some pictures."""

    key: str
    shard: str
    messages: list[dict[str, Any]]
    """[{"role", "content": [{"type": "image"} | {"type": "text", "text"}, ...]}, ...]"""
    images: list[Any]
    """Pillow's pictures, or tensors [3, H, W] of uint8."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The other keys of KEY.json, e.g. task."""


def parse_sample(
    raw: dict[str, Any], *, max_image_pixels: int, caption_prompt: str, draw: str | None = None, as_pixels: bool = False
) -> Sample:
    """One form for every sample.

    Args:
        raw: a webdataset sample: `__key__`, `__url__` and the members' bytes by extension.
        draw: what decides which of several captions is taken, together with the sample's key; None: the first.
        as_pixels: pictures as tensors [3, H, W] of uint8, which every processor takes, instead of Pillow's.

    Raises:
        BadSample: text or picture is missing or unreadable, or their numbers do not agree.
    """
    messages, meta = _read_messages(raw, caption_prompt, draw)
    members = picture_members(raw)
    check_messages(messages, len(members))
    decode = decode_pixels if as_pixels else decode_picture
    images = [decode(raw[member], member, max_image_pixels) for member in members]
    return Sample(raw["__key__"], raw.get("__url__", ""), messages, images, meta)


def outline(raw: dict[str, Any], *, max_image_pixels: int, caption_prompt: str, draw: str | None = None) -> tuple[list[dict], list[Size]]:
    """A sample's messages, and the (width, height) of its pictures from their headers: what its length depends on.

    Raises:
        BadSample: as `parse_sample`, but for damage inside a picture.
    """
    messages, _ = _read_messages(raw, caption_prompt, draw)
    members = picture_members(raw)
    check_messages(messages, len(members))
    return messages, [picture_size(raw[member], member, max_image_pixels) for member in members]


def messages_of(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What a record's turns say, as `read_messages`; None: it has none."""
    key = next((key for key in TURNS if record.get(key) is not None), None)
    return None if key is None else read_messages(record[key], *TURNS[key])


def read_messages(turns: Any, role_key: str = "role", content_key: str = "content") -> list[dict[str, Any]]:
    """A list of turns -> messages with typed parts.

    Raises:
        BadSample: it is no list of turns, or a turn has an unknown role or part.
    """
    if not isinstance(turns, list) or not turns:
        raise BadSample("json: expected a list of turns")
    return [_message(turn, role_key, content_key) for turn in turns]


def check_messages(messages: list[dict[str, Any]], num_pictures: int) -> None:
    """Place the pictures that the text does not place, and see that messages and pictures agree.

    Raises:
        BadSample: they do not, or no assistant speaks.
    """
    _place_pictures(messages, num_pictures)
    asked = sum(part["type"] == "image" for message in messages for part in message["content"])
    if asked != num_pictures:
        raise BadSample(f"the text speaks of {asked} pictures, the sample has {num_pictures}")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadSample("no assistant turn to learn from")


def open_record(raw: dict[str, Any]) -> dict[str, Any]:
    """What a sample's JSON says; empty where it has none.

    Raises:
        BadSample: it is no JSON object.
    """
    if "json" not in raw:
        return {}
    try:
        record = json.loads(raw["json"])
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadSample(f"json: {error}") from None
    if not isinstance(record, dict):
        raise BadSample("json: expected an object with 'messages', 'conversations' or 'captions'")
    return record


def _read_messages(raw: dict[str, Any], caption_prompt: str, draw: str | None) -> tuple[list[dict], dict[str, Any]]:
    record = open_record(raw)
    meta = {key: value for key, value in record.items() if key not in TURNS}
    if (messages := messages_of(record)) is not None:
        return messages, meta
    caption = _one_of(record["captions"], raw["__key__"], draw) if "captions" in record else _caption(raw, record)
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": caption_prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ], meta


def _caption(raw: dict[str, Any], record: dict[str, Any]) -> str:
    try:
        caption = raw["txt"].decode("utf-8") if "txt" in raw else record.get("caption")
    except UnicodeDecodeError as error:
        raise BadSample(f"txt: {error}") from None
    if not isinstance(caption, str) or not caption.strip():
        raise BadSample("no text: expected json with 'messages', 'conversations' or 'captions', or txt with a caption")
    return caption.strip()


def _one_of(captions: Any, key: str, draw: str | None) -> str:
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) and text.strip() for text in captions):
        raise BadSample("json: 'captions' is no list of texts")
    number = 0 if draw is None else random.Random(f"{draw}/{key}").randrange(len(captions))
    return captions[number].strip()


def _message(turn: Any, role_key: str, content_key: str) -> dict[str, Any]:
    role = turn.get(role_key) if isinstance(turn, dict) else None
    if role not in LLAVA_ROLES:
        raise BadSample(f"json: a turn's '{role_key}' is {role!r}; expected one of {', '.join(LLAVA_ROLES)}")
    content = turn.get(content_key)
    if isinstance(content, str):
        return {"role": LLAVA_ROLES[role], "content": _split_markers(content)}
    if not isinstance(content, list):
        raise BadSample(f"json: a turn's '{content_key}' is neither text nor a list of parts")
    return {"role": LLAVA_ROLES[role], "content": [_part(part) for part in content]}


def _split_markers(text: str) -> list[dict[str, str]]:
    """LLaVA writes `<image>` in the text where a picture stands."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split("<image>")):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts


def _part(part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image", "image_url"):
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise BadSample(f"json: a part of type {kind!r}; expected image, or text with 'text'")


def picture_members(raw: dict[str, Any]) -> list[str]:
    """Names of the picture members, by number."""
    found = [(int(match[1] or 0), name) for name in raw if (match := PICTURE_MEMBER.fullmatch(name))]
    return [name for _, name in sorted(found)]


def _place_pictures(messages: list[dict[str, Any]], count: int) -> None:
    """Pictures that the text does not place stand at the start of the first user turn, as most data sets mean it."""
    placed = any(part["type"] == "image" for message in messages for part in message["content"])
    first_user = next((message for message in messages if message["role"] == "user"), None)
    if count and not placed and first_user is not None:
        first_user["content"][:0] = [{"type": "image"} for _ in range(count)]
