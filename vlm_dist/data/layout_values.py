"""Values as records have them -> texts, pictures, options of a question. No file is opened."""

from __future__ import annotations

import ast
import math
import re
import warnings
from typing import Any

from vlm_dist.data.json_text import read_object
from vlm_dist.errors import BadSample

PICTURE_KEYS = (
    "images", "image", "image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls", "image_bytes",
    "image_base64", "img", "imgs", "img_path", "picture", "pictures", "pixel_values", "jpg", "jpeg", "png", "webp",
)  # fmt: skip
FILE_KEYS = (
    "file_name", "filename", "image_name", "imgname", "img_name", "image_filename", "image_local_name", "filepath", "file_path", "file",
    "path", "url", "URL",
)  # fmt: skip
"""A picture where no turn is there to say so."""
NAMES_PICTURE = re.compile(r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|heif|avif|ppm|jfif)(?:\?.*)?$", re.IGNORECASE)
NUMBERED = re.compile(r"(?:image|img|picture)_?(\d{1,3})")
SOURCE_KEYS = ("bytes", "base64", "data", "path", "url", "image", "image_url", "img", "picture", "file_name", "src", "source")
TEXT_KEYS = ("answer", "raw", "sent", "sentence", "caption", "text", "value", "label", "answer_text", "content")
PLACEHOLDER = re.compile(r"<[^<>\s/]{1,60}>")


def texts_of(value: Any, depth: int = 0) -> list[str]:
    """The texts in a value: one text, a number, a list of them, objects such as VQA's {"answer": ...} or SQuAD's {"text": [...]}."""
    if value is None:
        return []
    if isinstance(value, str):
        listed = _listed_texts(value)
        return [text for text in listed if text.strip()] if listed is not None else [value.strip()] if value.strip() else []
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, int | float):
        return _number(value)
    if depth > 4:
        return []
    if isinstance(value, dict):
        key = next((key for key in TEXT_KEYS if value.get(key) is not None), None)
        return texts_of(value[key], depth + 1) if key else []
    if isinstance(value, list | tuple):
        return [text for item in value for text in texts_of(item, depth + 1)]
    return []


def _number(value: float) -> list[str]:
    if isinstance(value, float) and not math.isfinite(value):
        return []  # an empty cell of a table
    try:
        return [str(value)]
    except ValueError:  # more digits than Python writes
        return []


def _listed_texts(text: str) -> list[str] | None:
    """A table's cell `["14", "15"]` or `['14']`; None: it is no list of texts, but a text."""
    text = text.strip()
    if not (text.startswith(("['", '["')) and text.endswith(("']", '"]'))):
        return None
    found = parsed(text)
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) else None


def parsed(text: str) -> Any:
    """What a text says as JSON, or as Python's literal; None: neither.

    Raises:
        BadSample: a key stands twice in one of its objects.
    """
    for read in (read_object, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # of backslashes
                return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def is_present(value: Any) -> bool:
    """Whether a record's value says something; safe for arrays and tensors."""
    if value is None or isinstance(value, str | bytes | list | tuple | dict):
        return bool(value)
    return not (isinstance(value, float) and math.isnan(value))


def source_of(value: Any, depth: int = 0) -> Any:
    """The picture that an object names: {"url": ...}, {"base64": ...}, Anthropic's {"source": {"data": ...}}; None: none."""
    if not isinstance(value, dict):
        return value if is_present(value) else None
    if value.get("bytes") is not None:
        return value
    if depth > 4:
        return None
    key = next((key for key in SOURCE_KEYS if is_present(value.get(key))), None)
    if key is None and any(is_present(item) for item in value.values()) and not any(key in value for key in SOURCE_KEYS):
        raise BadSample(f"a picture is an object with {keys_of(value)}; expected bytes, path, url or base64")
    if key is None:
        return None
    found = source_of(value[key], depth + 1)
    is_encoded = key == "base64" or (key == "data" and (value.get("type") == "base64" or "media_type" in value or "mime_type" in value))
    if is_encoded and isinstance(found, str) and not found.startswith("data:"):
        return f"data:;base64,{found}"
    return found


def pictures_of(record: dict[str, Any], column: str | None, files: str | None) -> tuple[list[Any], list[str]]:
    """A record's pictures in order, and the keys that held them.

    Args:
        column: the key, where the user names it.
        files: also from keys such as "file_name" and "url", which beside turns say something else: "any" text there, or "named": that
            ends as pictures do.
    """
    if column is not None:
        columns = columns_in(column, record)
        return [source for one in columns for source in sources_in(record.get(one))], columns
    own = [key for key in PICTURE_KEYS[:2] if key in record]
    both = [sources_in(record[key]) for key in own]
    if len(both) == 2 and all(both) and not all(any(_are_same(one, other) for other in both[0]) for one in both[1]):
        raise BadSample("'images' and 'image' name other pictures; `data pack --image NAME` says which, or `--image images,image`")
    for key in PICTURE_KEYS:
        if key in record and (found := sources_in(record[key])):
            return found, [*own, key]
    numbered = sorted((int(match[1]), key) for key in record if isinstance(key, str) and (match := NUMBERED.fullmatch(key)))
    if found := [source for _, key in numbered for source in sources_in(record[key])]:
        return found, [*own, *(key for _, key in numbered)]
    if files and not own:
        for key in FILE_KEYS:
            value = record.get(key)
            if isinstance(value, str) and value and (files == "any" or NAMES_PICTURE.search(value)):
                return [value], []
    return [], own


def _are_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, str | bytes | dict) and type(one) is type(other) and one == other)


def columns_in(named: str, record: dict[str, Any]) -> list[str]:
    """The keys that the user names: one, or several with commas between them."""
    return [named] if named in record else [one.strip() for one in named.split(",") if one.strip()]


def sources_in(value: Any) -> list[Any]:
    """What a key names: one source or several."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        listed = parsed(value)
        value = listed if isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed) else value
    if named := named_sources(value):
        return list(named.values())
    if isinstance(value, list | tuple) and not _is_pixels(value):
        sources = [source_of(item) for item in value]
        return [source for source in sources if source is not None]
    found = source_of(value)
    return [] if found is None else [found]


def named_sources(value: Any) -> dict[str, Any]:
    """Pictures by the placeholder that stands for each in the text, as MiniCPM-V has them: {"<image_00>": source, ...}; else none."""
    if not isinstance(value, dict) or not value or not all(isinstance(key, str) and PLACEHOLDER.fullmatch(key) for key in value):
        return {}
    return {key: source for key, item in value.items() if (source := source_of(item)) is not None}


def _is_pixels(value: Any) -> bool:
    """Rows of pixels, as a data set without an Image column gives them."""
    row = value[0] if value else None
    first = row[0] if isinstance(row, list) and row else None
    return isinstance(first, list) or (isinstance(first, int | float) and not isinstance(first, bool))


def shown(value: Any, length: int = 80) -> str:
    """A value for a message: short, on one line."""
    try:
        text = repr(value) if not isinstance(value, str) else repr(value[: length + 1])
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= length else text[:length] + "..."


def keys_of(record: dict[str, Any]) -> str:
    """A record's keys, for a message."""
    return ", ".join(key[:40] if isinstance(key, str) and key.isprintable() else shown(key, 40) for key in list(record)[:30]) or "none"
