"""Boxes and points as data sets write them -> a record's `objects`, corners in the picture's pixels (boxes.py). No file is opened.

Hugging Face's detection sets have COCO's boxes, [x, y, width, height], in columns ({"bbox": [...], "category": [...]}); Qwen's have corners
under `bbox_2d`, in pixels (2.5) or thousandths (2 and 3); Gemma's [y1, x1, y2, x2] in thousandths under `box_2d`; Molmo's points {x, y}.
`bbox_format` of the record says otherwise, which `data pack --boxes` sets.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from vlm_dist.data.boxes import CORNERS, FORMATS, LABELS, WIDTHS, are_objects
from vlm_dist.data.layout_values import parsed, shown, texts_of
from vlm_dist.errors import BadSample

BOX_KEYS = ("bbox", "bbox_xyxy", "bbox_xywh", "box", "bboxes", "boxes", "bbox_2d", "box_2d")
NAMES = (*LABELS, "categories", "labels", "names", "classes", "category_name", "category_id", "class_id", "category_ids", "ref")
OF_COCO = ("category_id", "area", "iscrowd", "segmentation")  # keys of an object whose box may be a corner, a width and a height
NOT_KEPT = (*OF_COCO, "id", "bbox_id", "image_id")
OWN_2D = {"bbox_2d": "bbox", "box_2d": "bbox", "point_2d": "point"}
WORDS = {
    "xyxy": "x1, y1, x2, y2", "xywh": "x, y, width, height", "cxcywh": "x and y of the centre, width, height", "yxyx": "y1, x1, y2, x2",
    "xy": "x, y",
}  # fmt: skip
FORMS = ("xywh", "xyxy", "cxcywh", "xywh/1", "xyxy/1", "cxcywh/1", "xyxy/100", "xyxy/1000", "xy", "xy/1", "xy/100", "xy/1000")
FORM = re.compile(rf"({'|'.join(WORDS)})(?:/(1|100|1000))?")
FIRST, LAST = (("x1", "xmin", "left", "x"), ("y1", "ymin", "top", "y")), (("x2", "xmax", "right"), ("y2", "ymax", "bottom"))
LONG = (("w", "width"), ("h", "height"))
SIDES = frozenset(key for keys in (*FIRST, *LAST, *LONG) for key in keys)
FORM_KEYS = (*FORMATS, "bbox_mode", "box_format")
LIMIT = 1e9
OTHERWISE = "`data pack --boxes` says"


class Form(NamedTuple):
    """What a place's numbers mean."""

    order: str
    grid: int | None = None
    """The whole width, and the whole height, count so many; None: pixels."""


def form_named(record: dict[str, Any]) -> Form | None:
    """What `bbox_format` and its like say of a record or an object; None: nothing.

    Raises:
        BadSample: something that is not known.
    """
    for key in FORM_KEYS:
        value = record.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            form = _form(value)
            if form is None and key != "format":  # which may be the picture's
                raise BadSample(f"'{key}' is {shown(value)}; expected one of {', '.join(FORMS)}")
            if form is not None:
                return form
    return None


def _form(name: str | int) -> Form | None:
    if isinstance(name, int):
        return {0: Form("xyxy"), 1: Form("xywh")}.get(name)  # detectron2's BoxMode
    name = name.lower().removeprefix("boxmode.").removesuffix("_abs")
    if name in (*CORNERS, *WIDTHS, "yolo"):
        return Form("cxcywh", 1) if name == "yolo" else Form("xyxy" if name in CORNERS else "xywh")
    found = FORM.fullmatch(name)
    return Form(found[1], int(found[2]) if found[2] else None) if found else None


def with_objects(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose `objects` or `points` stand there in another form than boxes.py reads, with `objects` in that form.

    Raises:
        BadSample: a box is none, or what its numbers mean cannot be told.
    """
    if "objects" not in record:
        return _with_points(record) if "points" in record else record
    value, form = record["objects"], form_named(record)
    value = parsed(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    rows = _rows(value)
    value = rows if rows and isinstance(value, list) else value
    if rows is None or (isinstance(value, dict) and form is None and are_objects(value)):  # ms-swift's
        return {**record, "objects": value} if isinstance(value, list | dict) else record
    key = next((key for key in (*BOX_KEYS, *OWN_2D) if any(one.get(key) is not None for one in rows)), None)
    if isinstance(value, list) and key in (None, "bbox") and form is None and all(isinstance(_label(one), str) for one in rows):
        _refuse_doubt(rows)
        return {**record, "objects": value}
    form = form or _default(key, value, rows, record)
    kept = [one for one in rows if not one.get("iscrowd")]
    crowds = {"crowds": len(rows) - len(kept)} if len(kept) < len(rows) else {}
    return {**_without_form(record), **crowds, "objects": [_turned(one, form) for one in kept], **sized(record, form.grid)}


def reading(record: dict[str, Any]) -> str | None:
    """How the numbers of a record's boxes or points are read, in words; None: it has none that are turned."""
    form = form_named(record)
    value = record.get("objects")
    if value is not None:
        value = parsed(value) if isinstance(value, str) else value
        rows = _rows(value)
        key = next((key for key in (*BOX_KEYS, *OWN_2D) if any(one.get(key) is not None for one in rows or ())), None)
        form = form or (_default(key, value, rows or [], record) if key else None)
    elif isinstance(record.get("points"), list | dict):
        form = form or Form("xy")
    else:
        key = next((key for key in BOX_KEYS if isinstance(record.get(key), list) and record[key]), None)
        form = form or (_form_beside(record, key) if key else None)
    if form is None:
        return None
    return f"{WORDS[form.order]}, {f'of {form.grid}' if form.grid else 'in pixels'}"


def boxes_of(record: dict[str, Any], key: str, labels: list[str]) -> dict[str, Any]:
    """Boxes with words, as RefCOCO has them -> `objects`, and the size that they refer to: several expressions of one box, or one of each.
    COCO's boxes are [x, y, width, height]; where the annotation as COCO wrote it stands beside (`raw_anns`), or a key says so, they are
    corners.

    Raises:
        BadSample: a box is none, or their number is another than the labels'.
    """
    boxes, form = _several(record[key]), form_named(record) or _form_beside(record, key)
    labels = list(dict.fromkeys(labels)) if len(boxes) == 1 else labels
    if len(boxes) not in (1, len(labels)):
        raise BadSample(f"'{key}' has {len(boxes)} boxes for {len(labels)} texts; expected one for each")
    read = [corners_of(box, form.order) for box in boxes]
    pairs = zip(read * (len(labels) if len(read) == 1 else 1), labels, strict=True)
    size = {"objects_size": [form.grid, form.grid]} if form.grid else {}
    return {"objects": [{"bbox": box, "label": label} for box, label in pairs], **size}


def _several(value: list[Any]) -> list[Any]:
    return value if isinstance(value[0], list | tuple) else [value]


def _form_beside(record: dict[str, Any], key: str) -> Form:
    if key == "bbox" and record.get("raw_anns") is not None:
        return Form("xyxy")
    return _default(key, {}, [{key: box} for box in _several(record[key])], record)


def corners_of(box: Any, order: str = "xywh") -> list[float]:
    """Four numbers -> [x1, y1, x2, y2].

    Args:
        order: xywh (COCO's), cxcywh (of the centre), xyxy or yxyx.

    Raises:
        BadSample: it is no box.
    """
    words = WORDS[order]
    is_box = isinstance(box, list | tuple) and len(box) == 4 and all(type(side) in (int, float) for side in box)
    if not is_box or not all(abs(side) < LIMIT for side in box):  # not for NaN and infinity either
        raise BadSample(f"a box is {shown(box)}; expected four numbers: {words}")
    first, second, third, fourth = box
    corners = {
        "xywh": [first, second, first + third, second + fourth],
        "cxcywh": [first - third / 2, second - fourth / 2, first + third / 2, second + fourth / 2],
        "yxyx": [second, first, fourth, third],
    }.get(order, list(box))
    if corners[2] <= corners[0] or corners[3] <= corners[1]:
        raise BadSample(f"a box is {shown(box)}, which is empty; expected {words}")
    return [round(side, 4 if order == "cxcywh" or max(corners) <= 1 else 2) for side in corners]


def sized(record: dict[str, Any], grid: int | None = None) -> dict[str, Any]:
    """`objects_size`, what a record's boxes refer to: files are often smaller than they were, or turned by their EXIF orientation."""
    if grid is not None:
        return {"objects_size": [grid, grid]}
    size = [record.get(side) for side in ("width", "height")]
    is_told = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size)
    return {"objects_size": size} if is_told and "objects_size" not in record else {}


def _rows(value: Any) -> list[dict[str, Any]] | None:
    """Objects one by one, of a list or of columns; None: it is neither.

    Raises:
        BadSample: columns of another length than the boxes.
    """
    if isinstance(value, list):
        return [_with_box(one) for one in value] if value and all(isinstance(one, dict) for one in value) else None
    if not isinstance(value, dict):
        return None
    key = next((key for key in (*BOX_KEYS, *OWN_2D) if isinstance(value.get(key), list)), None)
    if key is None:
        return None
    columns = {name: column for name, column in value.items() if isinstance(column, list)}
    for name in NAMES:
        if name in columns and len(columns[name]) != len(value[key]):
            raise BadSample(f"'objects' has {len(value[key])} of '{key}' and {len(columns[name])} of '{name}'; expected one for each")
    whole = {name: column for name, column in columns.items() if len(column) == len(value[key])}
    return [dict(zip(whole, row, strict=True)) for row in zip(*whole.values(), strict=True)]


def _with_box(one: dict[str, Any]) -> dict[str, Any]:
    """An object whose sides have a name each, as Visual Genome's, with `bbox`."""
    key = next((key for key in (*BOX_KEYS, *OWN_2D, "point", "polygon") if one.get(key) is not None), None)
    box = _by_side(one if key is None else one[key] if isinstance(one[key], dict) else {})
    if box is None:
        return one
    rest = {name: value for name, value in one.items() if name != key and (key is not None or name not in SIDES)}
    return {**rest, "bbox": box, "format": "xyxy"}


def _by_side(value: dict[str, Any]) -> list[Any] | None:
    """[x1, y1, x2, y2] of {x, y, w, h}, {left, top, width, height}, {xmin, ymin, xmax, ymax} and their like."""

    def of(names: tuple[tuple[str, ...], ...]) -> list[Any]:
        return [next((value[key] for key in keys if type(value.get(key)) in (int, float)), None) for keys in names]

    first, last, long = of(FIRST), of(LAST), of(LONG)
    if None not in (*first, *last):
        return [*first, *last]
    return corners_of([*first, *long]) if None not in (*first, *long) else None


def _label(one: dict[str, Any]) -> Any:
    return next((one[key] for key in NAMES if one.get(key) is not None), "")


def _refuse_doubt(rows: list[dict[str, Any]]) -> None:
    """A list of COCO's annotations: its boxes may be as COCO's, or as ours."""
    says = any(name in one for one in rows for name in FORM_KEYS)
    key = next((key for key in OF_COCO if not says and any(key in one for one in rows)), None)
    if key is not None and any("bbox" in one for one in rows):
        raise BadSample(
            f"'objects' has '{key}', as COCO's annotations: its bbox may be x, y, width, height, or x1, y1, x2, y2; `bbox_format` of the "
            f"record or {OTHERWISE} which (xywh, xyxy)"
        )


def _default(key: str | None, value: Any, rows: list[dict[str, Any]], record: dict[str, Any]) -> Form:
    """What the numbers mean by what they are called."""
    if key == "box_2d":
        return Form("yxyx", 1000)
    if key in OWN_2D or key == "points":
        order, grid = ("xyxy", "thousandths of it (xyxy/1000)") if key in OWN_2D else ("xy", "hundredths of it (xy/100)")
        places = [one.get(name) for one in rows for name in (*OWN_2D, "point") if one.get(name) is not None]
        numbers = [number for place in places if isinstance(place, list | tuple) for number in place if type(number) in (int, float)]
        most = 1000 if key in OWN_2D else 100
        is_told = record.get("objects_size") is not None or any("size" in one for one in rows)
        if is_told or max(numbers, default=0) > most:
            return Form(order)
        raise BadSample(
            f"'{key}' may be pixels of the picture ({order}) or {grid}; `objects_size` or `bbox_format` of the record, or {OTHERWISE} which"
        )
    if key is not None and "xyxy" in key:
        return Form("xyxy")
    if key == "bbox" and isinstance(value, list):
        _refuse_doubt(rows)
        return Form("xyxy")
    return Form("xywh")


def _turned(one: dict[str, Any], form: Form) -> dict[str, Any]:
    """An object with `bbox` in corners, or `point`, and `label` as a text; its other keys as they were."""
    key = next((key for key in (*BOX_KEYS, *OWN_2D, "point") if one.get(key) is not None), None)
    own = form_named(one)
    names = [name for name in NAMES if one.get(name) is not None]
    label = one[names[0]] if names else ""
    words = texts_of(label)
    rest = {name: item for name, item in one.items() if name not in (key, *names[:1], *FORM_KEYS, *NOT_KEPT) and item is not None}
    rest |= {"size": [own.grid, own.grid]} if own is not None and own.grid else {}
    if key is None:
        return {**rest, **({"label": words[0]} if words else {})}
    if OWN_2D.get(key, key) == "point":
        place: dict[str, Any] = {"point": one[key]}
    else:
        order = (own or form).order
        place = {"bbox": corners_of(one[key], "xyxy" if order == "xy" else order)}
    return {**place, **({"label": words[0]} if words else {}), **rest}


def _with_points(record: dict[str, Any]) -> dict[str, Any]:
    """Molmo's points of what `label` names; others' `points` stay what they are."""
    value, label = record["points"], record.get("label")
    if isinstance(value, dict) and all(isinstance(value.get(axis), list) for axis in "xy") and len(value["x"]) == len(value["y"]):
        value = [{"x": x, "y": y} for x, y in zip(value["x"], value["y"], strict=True)]
    is_points = isinstance(value, list) and all(isinstance(one, dict) and {"x", "y"} <= one.keys() for one in value)
    if not is_points or not isinstance(label, str) or not label.strip():
        return record
    if not value:
        raise BadSample(f"no point of {shown(label)}: a picture without what is asked for is not learnt from")
    places = [[one["x"], one["y"]] for one in value]
    if not all(type(number) in (int, float) and math.isfinite(number) for place in places for number in place):
        raise BadSample(f"a point is {shown(value[0])}; expected numbers x and y")
    form = form_named(record) or _default("points", value, [{"point": place} for place in places], record)
    rest = {key: item for key, item in _without_form(record).items() if key not in ("points", "label")}
    return {**rest, "objects": [{"point": place, "label": label} for place in places], **sized(record, form.grid)}


def _without_form(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in FORM_KEYS or not isinstance(value, str | int) or _form(value) is None}
