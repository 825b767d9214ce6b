"""What of a sample nothing reads, or reads in another way than it may be meant: noted (tally.py), not passed over in silence."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from vlm_dist.data.boxes import FORMATS, are_objects, numbered, unread_object_keys
from vlm_dist.data.clips import VIDEO_KEYS, has_videos, is_of_video
from vlm_dist.data.damage import traces_in
from vlm_dist.data.layout_keys import ANSWERS, CAPTIONS, QUESTIONS
from vlm_dist.data.layout_options import how_answered
from vlm_dist.data.layout_values import FILE_KEYS, texts_of
from vlm_dist.data.layouts import layout_of
from vlm_dist.data.members import PICTURE_MEMBER, TEXT_MEMBERS, picture_members
from vlm_dist.data.messages import line_breaks_lost, odd_thoughts, texts_in, unread_keys, unread_part_keys, weighing_keys
from vlm_dist.data.tally import Note

NO_OBJECTS = "no list of {bbox | point | polygon, label}"
PLACEHOLDERS = ("<bbox>", "<ref-object>", "<objects>")  # what is no word of any other markup
METADATA = {
    "answer", "answers", "caption", "captions", "category", "dataset", "error_message", "exif", "file_name", "height", "id", "image",
    "image_id", "images", "key", "kind", "license", "messages", "objects", "objects_size", "original_height", "original_width",
    "question_id", "sha256", "source", "split", "status", "task", "tools", "url", "width", *FILE_KEYS,
}  # fmt: skip
"""Keys of KEY.json that are read elsewhere, or tell where a sample comes from and cannot change what it teaches."""


def notes_of(raw: dict[str, Any], record: dict[str, Any], given: Any) -> set[Note]:
    """Members, keys, and keys of turns that nothing reads, and what is taken away, or may be meant in another way.

    Args:
        raw: the sample's members.
        record: in the one form of layouts.py.
        given: the record that it was made of.
    """
    members = (name for name in raw if not name.startswith("__") and name != "json" and name not in TEXT_MEMBERS)
    notes = {("member", f".{name}") for name in members if not PICTURE_MEMBER.fullmatch(name) and not is_of_video(name)}
    known = METADATA | VIDEO_KEYS if has_videos(raw) else METADATA
    known = known | set(FORMATS) if record.get("objects") else known
    pictures = defaultdict(list)
    for name in picture_members(raw):
        pictures[int((PICTURE_MEMBER.fullmatch(name) or [0, 0])[1] or 0)].append(f".{name}")
    notes |= {("pictures", " and ".join(names)) for names in pictures.values() if len(names) > 1}
    notes |= {("text", name) for name in _texts_beside(raw, record)}
    notes |= {("key", str(key)[:60]) for key, value in record.items() if key not in known and value is not None}
    if (objects := record.get("objects")) and not are_objects(objects):
        notes.add(("key", f"objects ({NO_OBJECTS})"))
    elif objects:
        notes |= {("object key", key) for key in unread_object_keys(objects)} | {("number", label) for label in numbered(objects)}
    elif not objects and (found := next((one for one in PLACEHOLDERS if one.encode() in raw.get("json", b"")), None)):
        notes.add(("placeholder", found))
    turns = record.get("messages") or ()
    notes |= {("stripped", what) for what in line_breaks_lost(turns)} | {("thought", what) for what in odd_thoughts(turns)}
    notes |= {("stripped", "spaces and line breaks")} if _is_stripped(raw, record, given) else set()
    if (how := how_answered(given)) and ((layout := layout_of(given)) is None or layout.name == "question and answer"):
        notes.add(("option", how))
    notes |= {("damage", trace) for said, text in _texts(raw, record) for trace in traces_in(text, is_said=said)}
    if not turns and any(text.strip().isdecimal() for _, text in _texts(raw, record)):
        notes.add(("number", "captions"))
    notes |= {("part key", key) for key in unread_part_keys(turns)} | {("weight", key) for key in weighing_keys(turns)}
    return notes | {("turn key", key) for key in unread_keys(turns)}


def _texts(raw: dict[str, Any], record: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """(whether a model is to say it, text) of everything that is learnt from."""
    turns = record.get("messages")
    if turns is not None:
        yield from texts_in(turns)
    elif captions := _captions(record):
        yield from ((True, text) for text in captions)
    else:
        yield from ((True, raw[name].decode("utf-8", "replace").removeprefix("\ufeff")) for name in TEXT_MEMBERS if name in raw)


def _is_stripped(raw: dict[str, Any], record: dict[str, Any], given: Any) -> bool:
    """Whether a text of the record, or of a member, lost the space around it."""
    members = (raw[name].decode("utf-8-sig", "replace").rstrip("\r\n") for name in TEXT_MEMBERS if name in raw)
    keys = (*QUESTIONS, *ANSWERS, *CAPTIONS) if isinstance(given, dict) else ()
    values = (value for key in keys for value in _listed(given.get(key)))
    if not (record.get("messages") or _captions(record)):
        return any(_has_space(text) for text in members)
    odd = [text for text in values if isinstance(text, str) and _has_space(text)]
    if not odd:
        return False
    turns = record.get("messages") or ()
    said = [turn.get("content") for turn in turns if isinstance(turn, dict)] + _captions(record)
    whole = [text for text in said if isinstance(text, str)]
    return any(text.strip() in one and text not in one for text in odd for one in whole)


def _has_space(text: str) -> bool:
    """Around its words."""
    return text != text.strip() and bool(text.strip())


def _captions(record: dict[str, Any]) -> list[str]:
    return [text for text in _listed(record.get("captions") or record.get("caption")) if isinstance(text, str)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _texts_beside(raw: dict[str, Any], record: dict[str, Any]) -> set[str]:
    """Members and keys whose text is not what the sample says: another stands in its turns or captions, or in an earlier member."""
    members = {f".{name}": raw[name].decode("utf-8-sig", "replace").strip() for name in TEXT_MEMBERS if name in raw}
    turns = record.get("messages")
    keys = ("caption", "captions", "answer") if turns is not None else ("caption",) if members and "captions" not in record else ()
    given = [*members.items(), *((key, text) for key in keys for text in texts_of(record.get(key)))]
    if not given:
        return set()
    if turns is not None:
        said = json.dumps([turns, record.get("answers")], ensure_ascii=False, default=str)
        return {name for name, text in given if json.dumps(text, ensure_ascii=False)[1:-1] not in said}
    said = "\n".join(map(str, record["captions"])) if "captions" in record else given[0][1]
    return {name for name, text in given if text not in said}
