"""A tar sample's files -> one form: messages with typed parts, and the pictures in order of appearance.

Five forms are read (docs/data.md): `KEY.json` with "messages", with LLaVA's "conversations", with "captions" (several of one picture) or
with "objects" alone, and `KEY.txt` (a caption, as img2dataset writes). Pictures are `KEY.jpg|jpeg|png|webp`, or `KEY.0.jpg`,
`KEY.1.jpg`, ...; of videos see clips.py. Members are read from memory and never unpickled. Members and keys that nothing reads are noted
(unread.py).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vlm_dist.data.boxes import Marked, Orientation, are_objects, read_objects
from vlm_dist.data.clips import clips_of, has_videos
from vlm_dist.data.json_text import read_object
from vlm_dist.data.layout_captions import check_caption
from vlm_dist.data.layout_lists import looks_like_turns
from vlm_dist.data.layout_values import is_present, pictures_of, shown
from vlm_dist.data.layouts import canonical, layout_of
from vlm_dist.data.members import TEXT_MEMBERS, members_found, picture_members
from vlm_dist.data.messages import WEIGHTS, check_messages, read_messages, text_of
from vlm_dist.data.pictures import Size, decode_picture, decode_pixels, picture_orientation, picture_size
from vlm_dist.data.placing import asked_for, check_placeholders, placeholders_of, size_of
from vlm_dist.data.tally import Note
from vlm_dist.data.unread import NO_OBJECTS, notes_of
from vlm_dist.data.video import Clip
from vlm_dist.errors import BadSample


@dataclass
class Sample:
    """One conversation about some pictures and videos."""

    key: str
    shard: str
    messages: list[dict[str, Any]]
    """[{"role", "content": [{"type": "image"} | {"type": "text", "text"}, ...], "weight"?, ...}, ...], see `read_messages`."""
    images: list[Any]
    """Pillow's pictures, or tensors [3, H, W] of uint8."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The other keys of KEY.json, e.g. task."""
    tools: list[Any] | None = None
    """What the assistant may call, as the chat template takes it."""
    notes: set[Note] = field(default_factory=set)
    """What of the sample nothing reads."""
    objects: list[Marked] = field(default_factory=list)
    """What is marked in the pictures; where the text has placeholders, `Placing.written` puts them there."""
    videos: list[Clip] = field(default_factory=list)
    """In order of appearance, not yet decoded."""

    @property
    def sizes(self) -> list[Size]:
        """(width, height) of each picture."""
        return [size_of(image) for image in self.images]


class Outline(NamedTuple):
    """What the length of a sample depends on."""

    messages: list[dict[str, Any]]
    sizes: list[Size]
    """(width, height) of each picture."""
    tools: list[Any] | None
    objects: list[Marked]
    videos: list[Clip]


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
    given = open_record(raw)
    record = _canonical(raw, given)
    messages = _messages(raw, record, caption_prompt, draw)
    members = picture_members(raw)
    videos = clips_of(raw, record, max_image_pixels)
    check_messages(messages, len(members), members_found(raw), len(videos))
    decode = decode_pixels if as_pixels else decode_picture
    images = [decode(raw[member], member, max_image_pixels) for member in members]
    meta = {key: value for key, value in record.items() if key not in ("messages", "images")}
    objects = _objects(raw, record, messages, [size_of(image) for image in images])
    place = str(raw["__key__"]), raw.get("__url__", "")
    return Sample(*place, messages, images, meta, _tools(record), notes_of(raw, record, given), objects, videos)


def outline(raw: dict[str, Any], *, max_image_pixels: int, caption_prompt: str, draw: str | None = None) -> Outline:
    """A sample's messages, and the (width, height) of its pictures from their headers: what its length depends on.

    Raises:
        BadSample: as `parse_sample`, but for damage inside a picture.
    """
    record = _canonical(raw, open_record(raw))
    messages = _messages(raw, record, caption_prompt, draw)
    members = picture_members(raw)
    videos = clips_of(raw, record, max_image_pixels)
    check_messages(messages, len(members), members_found(raw), len(videos))
    sizes = [picture_size(raw[member], member, max_image_pixels) for member in members]
    return Outline(messages, sizes, _tools(record), _objects(raw, record, messages, sizes), videos)


def open_record(raw: dict[str, Any]) -> dict[str, Any]:
    """What a sample's JSON says; empty where it has none.

    Raises:
        BadSample: it is no JSON object, or has a key twice.
    """
    if "json" not in raw:
        return {}
    try:
        record = read_object(raw["json"])
    except (ValueError, RecursionError, BadSample) as error:  # no UTF-8, no JSON, a number of thousands of digits; nested without end
        raise BadSample(f"json: {str(error)[:200]}") from None
    if isinstance(record, list) and looks_like_turns(record):
        return {"messages": record}
    if not isinstance(record, dict):
        raise BadSample("json: expected an object with 'messages', 'conversations' or 'captions'")
    return record


def _canonical(raw: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The JSON in the one form of records (layouts.py); as it is beside a text of its own."""
    for key in WEIGHTS:
        if isinstance(value := record.get(key), bool | int | float) and not value:
            raise BadSample(f"json: '{key}' of the whole record is {str(value).lower()}: not learnt from, as it says")
    if not record or (any(name in raw for name in TEXT_MEMBERS) and "objects" not in record and takes_text(record)):
        return record
    try:
        made = canonical(record)
        named = next((key for key in ("video", "videos") if is_present(record.get(key))), None)
        if named is not None and not has_videos(raw):
            raise BadSample(f"'{named}' is {shown(record[named], 40)}; a video is expected as a member, KEY.mp4")
        named = pictures_of(record, None, None)[0] if len(made["images"]) > 1 else []
        if len(named) == len(made["images"]) and named != made["images"]:
            raise BadSample("the text places its pictures in another order than their files have; `data pack` writes them in order")
        return {key: value for key, value in made.items() if key != "videos"}
    except BadSample as reason:
        raise BadSample(f"json: {reason}{members_found(raw)}") from None


def takes_text(record: dict[str, Any]) -> bool:
    """Whether the text beside a JSON is what the assistant says: the JSON has neither turns nor an answer nor several captions."""
    if any(key in record for key in ("messages", "conversations")) or record.get("captions"):
        return False
    layout = layout_of(record)
    return layout is None or layout.name in ("captions", "objects")


def _messages(raw: dict[str, Any], record: dict[str, Any], caption_prompt: str, draw: str | None) -> list[dict]:
    if record.get("messages") is not None:
        return read_messages(record["messages"])
    is_silent = "captions" not in record and not any(name in raw for name in TEXT_MEMBERS)
    if is_silent and (about_objects := asked_for(record, str(raw["__key__"]), draw)) is not None:
        return about_objects
    caption = _one_of(record["captions"], raw["__key__"], draw) if "captions" in record else _caption(raw)
    return [
        {"role": "user", "content": [*([] if has_videos(raw) else [{"type": "image"}]), {"type": "text", "text": caption_prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]


def _objects(raw: dict[str, Any], record: dict[str, Any], messages: list[dict], sizes: list[Size]) -> list[Marked]:
    members = picture_members(raw)
    return objects_of(record, messages, sizes, lambda image: picture_orientation(raw[members[image]]))


def objects_of(record: dict[str, Any], messages: list[dict], sizes: list[Size], orientation: Orientation) -> list[Marked]:
    """What a record marks in its pictures of these (width, height), upright.

    Raises:
        BadSample: an object lies outside of its picture, or their number is not that of the text's placeholders.
    """
    if not record.get("objects"):
        return []
    if not are_objects(record["objects"]):
        if found := placeholders_of(messages):
            raise BadSample(f"json: the text has {found[0]}, and 'objects' is {NO_OBJECTS}")
        return []
    objects = read_objects(record, sizes, orientation)
    check_placeholders(messages, objects)
    return objects


def _caption(raw: dict[str, Any]) -> str:
    member = next((name for name in TEXT_MEMBERS if name in raw), None)
    try:
        caption = raw[member].decode("utf-8-sig") if member else ""
    except UnicodeDecodeError as error:
        raise BadSample(f"{member}: {error}") from None
    if not caption.strip():
        expected = "json with 'messages', 'conversations', 'captions' or 'objects', or txt with a caption"
        raise BadSample(f"no text: expected {expected}{members_found(raw)}")
    check_caption(caption)
    return text_of(caption.strip())


def _one_of(captions: Any, key: str, draw: str | None) -> str:
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) and text.strip() for text in captions):
        raise BadSample("json: 'captions' is no list of texts")
    number = 0 if draw is None else random.Random(f"{draw}/{key}").randrange(len(captions))
    return text_of(captions[number].strip())


def _tools(record: dict[str, Any]) -> list[Any] | None:
    tools = record.get("tools")
    if not tools:
        return None
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadSample("json: 'tools' is no list of objects")
    return tools
