"""What a JSON document holds -> records: a list, an object that wraps one, COCO's tables, objects by id."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vlm_dist.data.json_text import Twice
from vlm_dist.data.layout_boxes import corners_of, sized
from vlm_dist.data.layout_lists import is_one_talk
from vlm_dist.data.layout_values import FILE_KEYS, NAMES_PICTURE, PICTURE_KEYS, pictures_of
from vlm_dist.data.layouts import layout_of
from vlm_dist.errors import BadSample, DataError

WRAPPERS = (
    "data",
    "records",
    "samples",
    "rows",
    "examples",
    "annotations",
    "items",
    "questions",
    "instances",
    "entries",
    "dataset",
    "train",
)
WITH_TURNS = ("messages", "conversations", "pairs of texts", "prompt and completion", "Alpaca", "query and response")


def records_in(value: Any, path: Path) -> Iterator[Any]:
    """The records of a JSON document, or of a line that holds a list.

    Raises:
        DataError: it holds no list.
    """
    if isinstance(value, list):
        yield from [value] if is_one_talk(value) else _flat(value)
        return
    if not isinstance(value, dict) or not value:
        raise DataError(f"data pack: '{path}' holds no list; expected [{{...}}, ...], or one object a line in a .jsonl file")
    if isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list):
        yield from coco_records(value)
        return
    if _is_split(value):  # as pandas writes it with orient="split"
        yield from (dict(zip(value["columns"], row, strict=True)) for row in value["data"])
        return
    layout = layout_of(value)
    wrapped = next(
        (key for key in WRAPPERS if isinstance(value.get(key), list) and all(isinstance(v, dict | list) for v in value[key])), None
    )
    if wrapped is not None and (layout is None or layout.name not in WITH_TURNS):
        subset = value.get("data_subtype")  # VQA's: which of COCO's pictures
        more = {"split": subset} if isinstance(subset, str) and subset else {}
        for item in _flat(value[wrapped]):
            item = item["row"] if isinstance(item, dict) and isinstance(item.get("row"), dict) else item
            yield _with(more, item) if isinstance(item, dict) else item
    elif layout is not None and layout.name not in WITH_TURNS and _is_table(value):
        yield from (dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True))
    elif layout is not None:
        yield value
    elif isinstance(value.get("images"), list) and all(isinstance(item, dict) for item in value["images"]):
        yield from map(_karpathy, value["images"])
    elif all(isinstance(item, dict | list | str) for item in value.values()):
        yield from _by_id(value)
    else:
        raise DataError(f"data pack: '{path}' holds no list; its keys are {', '.join(map(str, list(value)[:20]))}; expected [{{...}}, ...]")


def _with(more: dict[str, Any], record: dict[str, Any]) -> Any:
    """A record with what the document says of all; one in which a key stands twice is none."""
    return BadSample(record.reason) if isinstance(record, Twice) else {**more, **record}


def _is_split(value: dict[str, Any]) -> bool:
    """Names of columns beside rows of so many cells."""
    names, rows = value.get("columns"), value.get("data")
    are_rows = isinstance(names, list) and isinstance(rows, list) and all(isinstance(row, list) and len(row) == len(names) for row in rows)
    return are_rows and bool(rows) and all(isinstance(name, str) for name in names)


def _is_table(value: dict[str, Any]) -> bool:
    """Columns of equal length, one of them of pictures: {"image": [...], "question": [...]}."""
    lengths = {len(column) if isinstance(column, list) else 0 for column in value.values()}
    return len(lengths) == 1 and max(lengths) > 1 and any(key in value for key in (*PICTURE_KEYS, *FILE_KEYS))


def _flat(values: list[Any]) -> Iterator[Any]:
    """Lists of records, as Qwen's packed ones, become records one by one; a list of turns is one."""
    for value in values:
        if isinstance(value, list) and value and not is_one_talk(value) and all(isinstance(item, dict) for item in value):
            yield from value
        else:
            yield value


def _karpathy(image: dict[str, Any]) -> dict[str, Any]:
    """A row of Karpathy's split: the folder stands apart from the name."""
    if isinstance(image.get("filepath"), str) and isinstance(image.get("filename"), str):
        return {**image, "image": f"{image['filepath']}/{image['filename']}"}
    return image


def _by_id(value: dict[str, Any]) -> Iterator[Any]:
    """{"ID": record, ...}, {"PICTURE": [captions], ...}, or pandas' {"column": {"0": cell, ...}, ...}."""
    columns = [column for column in value.values() if isinstance(column, dict)]
    is_table = len(columns) == len(value) > 1 and columns[0] and all(column.keys() == columns[0].keys() for column in columns)
    if is_table and layout_of({name: cells[next(iter(cells))] for name, cells in value.items()}) is not None:
        yield from ({name: cells[row] for name, cells in value.items()} for row in columns[0])
        return
    for key, item in value.items():
        named = {"image": key} if NAMES_PICTURE.search(key) else {"id": key}
        if isinstance(item, str):
            yield {**named, "caption": item}
        elif isinstance(item, list) and is_one_talk(item):
            yield {**named, "messages": item}
        elif isinstance(item, list) and all(isinstance(text, str) for text in item):
            yield {**named, "captions": item}
        else:
            for record in item if isinstance(item, list) else [item]:
                has_own = isinstance(record, dict) and any(key in record for key in PICTURE_KEYS)
                yield _with({"id": key} if has_own else named, record) if isinstance(record, dict) else record


def coco_records(value: dict[str, Any]) -> Iterator[Any]:
    """COCO's tables -> a record a picture, with its captions and its boxes in corners; of annotations with a question a record each."""
    images = {image["id"]: image for image in value["images"] if isinstance(image, dict) and isinstance(image.get("id"), int | str)}
    categories = value.get("categories") if isinstance(value.get("categories"), list) else []
    names = {item["id"]: item.get("name") for item in categories or [] if isinstance(item, dict) and isinstance(item.get("id"), int | str)}
    gathered: dict[Any, dict[str, Any]] = {}
    others: list[Any] = []
    for annotation in value["annotations"]:
        number = annotation.get("image_id") if isinstance(annotation, dict) else None
        image = images.get(number) if isinstance(number, int | str) else None
        if isinstance(annotation, Twice):
            others.append(BadSample(annotation.reason))
            continue
        if image is None:
            others.append(BadSample(f"an annotation of the picture {str(number)[:40]!r}, which 'images' does not have"))
            continue
        file, facts = _file_of(image)
        try:
            _add(annotation, gathered.setdefault(number, {}), names, partial(_keep, others, file))
        except BadSample as reason:
            gathered.setdefault(number, {}).setdefault("bad", reason)
        if gathered[number]:
            gathered[number] |= {"image": file, **facts}
    for number, image in images.items():
        record = gathered.get(number)
        if record is None:
            yield BadSample(f"picture {str(_file_of(image)[0])[:200]!r} has no annotation")
        elif record:
            has_some = "objects" in record or "captions" in record
            found = {**record, **sized(record)} if "objects" in record else record
            yield record.get("bad") or (found if has_some else _only_crowds(record))
    yield from others


def _only_crowds(record: dict[str, Any]) -> BadSample:
    return BadSample(f"picture {str(record['image'])[:200]!r} has boxes around crowds (iscrowd) alone")


def _file_of(image: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    found, _ = pictures_of(image, None, "any")
    file = image.get("file_name") or (found[0] if found else image.get("coco_url") or image.get("flickr_url"))
    return file, {key: image[key] for key in ("width", "height") if key in image} | {"image_id": image["id"]}


def _keep(others: list[Any], file: Any, annotation: Any) -> None:
    """What belongs to no picture's record, as a record of its own."""
    others.append(annotation if isinstance(annotation, BadSample) else {**annotation, "image": file})


def _add(annotation: dict[str, Any], record: dict[str, Any], names: dict[Any, Any], otherwise: Any) -> None:
    """An annotation to its picture's record."""
    if isinstance(annotation.get("caption"), str) and "bbox" not in annotation:
        record.setdefault("captions", []).append(annotation["caption"])
    elif annotation.get("bbox") and annotation.get("iscrowd"):
        record["crowds"] = record.get("crowds", 0) + 1  # around many: no box to learn
    elif annotation.get("bbox"):
        number = annotation.get("category_id")
        label = annotation.get("caption") or (names.get(number) if isinstance(number, int | str) else None)
        if label is None:
            raise BadSample(f"a box of the category {str(number)[:40]!r}, which 'categories' does not have")
        try:
            corners = corners_of(annotation["bbox"])
        except BadSample as reason:  # the picture's other boxes stay
            otherwise(BadSample(f"picture {str(annotation.get('image_id'))[:40]!r}: {reason}"))
            return
        record.setdefault("objects", []).append({"bbox": corners, "label": str(label)})
    else:
        otherwise(annotation)
