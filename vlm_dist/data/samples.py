"""A tar sample's files -> one form: messages with typed parts, and the pictures in order of appearance.

Four forms are read (docs/data.md): `KEY.json` with "messages", with LLaVA's "conversations" or with "captions" (several of one
picture), and `KEY.txt` (a caption, as img2dataset writes). Pictures are `KEY.jpg|jpeg|png|webp`, or `KEY.0.jpg`, `KEY.1.jpg`, ... .
Members are read from memory and never unpickled; any other member is ignored.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

PICTURE_MEMBER = re.compile(r"(?:(\d+)\.)?(?:jpg|jpeg|png|webp)$")
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
ORIENTATION = 0x0112  # the EXIF tag
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
EXTRANEOUS = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes")  # libjpeg's warning
MOST_FILLER = 16  # bytes that some writers leave between segments; more were skipped because the scan is damaged
Size = tuple[int, int]
TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}  # key of a list of turns: a turn's own keys
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadSample(Exception):
    """This one sample cannot be used; the message says why. It is skipped, counted and named in quarantine.jsonl."""


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
    return messages, [_picture_size(raw[member], member, max_image_pixels) for member in members]


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


def decode_picture(data: bytes, name: str, max_pixels: int) -> Image:
    """Bytes -> RGB picture, upright. The size is checked in the header, before anything is decoded.

    Raises:
        BadSample: not a JPEG, PNG or WebP file, too large, or damaged.
    """
    from PIL import Image, ImageOps

    with _as_bad_sample(name):
        picture = _open_picture(data, name, max_pixels)
        orientation = picture.getexif().get(ORIENTATION, 1)
        if _is_plain_jpeg(picture):
            picture = Image.fromarray(_decode_jpeg(data))
        if orientation != 1:
            picture.getexif()[ORIENTATION] = orientation
            picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            ground = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(ground, picture)
        picture.load()
        return picture if picture.mode == "RGB" else picture.convert("RGB")


def decode_pixels(data: bytes, name: str, max_pixels: int) -> torch.Tensor:
    """The same pixels, and errors, as [3, H, W] uint8; without the way through Pillow where there is a shorter one."""
    import numpy as np
    import torch

    with _as_bad_sample(name):
        picture = _open_picture(data, name, max_pixels)
        is_upright = picture.getexif().get(ORIENTATION, 1) == 1
        if _is_plain_jpeg(picture) and is_upright:
            return torch.from_numpy(_decode_jpeg(data)).permute(2, 0, 1)
    return torch.from_numpy(np.array(decode_picture(data, name, max_pixels))).permute(2, 0, 1)


def _is_plain_jpeg(picture: Image) -> bool:
    return picture.format == "JPEG" and picture.mode in ("L", "RGB")


def _decode_jpeg(data: bytes) -> np.ndarray:
    """[H, W, 3] uint8: the same pixels as Pillow's, in less time; and where the file is damaged inside, this says so (Pillow gives grey
    from there on)."""
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, strict=True)
    except ValueError as warning:
        filler = EXTRANEOUS.search(str(warning))
        if filler is None or int(filler[1]) > MOST_FILLER:
            raise
        return simplejpeg.decode_jpeg(data, strict=False)


def _picture_size(data: bytes, name: str, max_pixels: int) -> Size:
    with _as_bad_sample(name):
        picture = _open_picture(data, name, max_pixels)
        width, height = picture.size
        return (height, width) if picture.getexif().get(ORIENTATION) in TURNED else (width, height)


def _open_picture(data: bytes, name: str, max_pixels: int) -> Image:
    """Reads the header only."""
    from PIL import Image

    picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
    if picture.width * picture.height > max_pixels:
        raise BadSample(f"{name}: {picture.width} x {picture.height} pixels, more than data.max_image_pixels={max_pixels:,}")
    return picture


@contextmanager
def _as_bad_sample(name: str) -> Iterator[None]:
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise BadSample(f"{name}: cannot be decoded ({str(error).splitlines()[0][:120]})") from None


def picture_extension(data: bytes) -> str | None:
    """jpg, png or webp by the file's first bytes; None: none of them."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[8:12] == b"WEBP" else None


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
