"""What a record's `objects` mark in its pictures: boxes, points and polygons, read, checked and put into the upright picture's pixels.

    {"objects": [{"bbox": [x1, y1, x2, y2], "label": "a cat"}, {"point": [x, y]}, {"polygon": [[x, y], ...], "image": 1}]}

Numbers are pixels from the top left of the picture as it stands upright, decoded: x to the right, y down, the far edges at width and
height. Where they refer to another size of it, `size: [width, height]` of the object or `objects_size` of the record says so: they are
scaled; [1, 1] says shares, [1000, 1000] thousandths. If that size is the one before the EXIF turn, they are turned too.
ms-swift's form is read besides: {"objects": {"ref": ["a cat"], "bbox": [[x1, y1, x2, y2]], "bbox_type": "norm1"}}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from vlm_dist.data.messages import text_of
from vlm_dist.data.pictures import TURNED, Size
from vlm_dist.errors import BadSample

Kind = Literal["bbox", "point", "polygon"]
Point = tuple[float, float]
KINDS: tuple[Kind, ...] = ("bbox", "point", "polygon")
GRIDS = ((1, 1), (100, 100), (1000, 1000))  # sizes that stand for shares of the width and the height
SLACK = 1.0  # pixels outside of the picture that are clipped
LABELS = ("label", "category", "name", "class", "text")
"""What an object is called: the first of these keys that it has."""
FORMATS = ("format", "bbox_format")
CORNERS, WIDTHS = ("xyxy", "voc", "pascal_voc", "corners"), ("xywh", "coco")
SWIFT = {"ref", "bbox", "bbox_type", "image_id"}  # keys of ms-swift's form
Orientation = Callable[[int], int]
"""Number of a picture -> its EXIF orientation."""


class Marked(NamedTuple):
    """One object of a picture, in pixels of the upright picture."""

    kind: Kind
    points: tuple[Point, ...]
    """Of a bbox its upper left and its lower right corner, of a point itself, of a polygon its corners in order."""
    label: str = ""
    image: int = 0
    """Of several pictures, in order of appearance."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) around it."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def centre(self) -> Point:
        """Mean of its corners."""
        xs, ys = zip(*self.points, strict=True)
        return sum(xs) / len(xs), sum(ys) / len(ys)

    def to_dict(self) -> dict[str, Any]:
        """As a record says it, numbers to a hundredth."""
        points = [[round(x, 2), round(y, 2)] for x, y in self.points]
        place = points if self.kind == "polygon" else [number for point in points for number in point]
        return {self.kind: place, **({"label": self.label} if self.label else {}), **({"image": self.image} if self.image else {})}


def are_objects(value: Any) -> bool:
    """Whether it is meant as marks: other data sets have a key `objects` for other things."""
    if isinstance(value, dict):
        return "bbox" in value and set(value) <= SWIFT
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and any(kind in one for kind in KINDS) for one in value)


def listed(value: Any) -> list[dict[str, Any]]:
    """Objects one by one, not checked but for ms-swift's form, whose lists must be as long as each other."""
    if not isinstance(value, dict):
        return value
    boxes, labels, images = (value.get(key) or [] for key in ("bbox", "ref", "image_id"))
    if not all(isinstance(part, list) for part in (boxes, labels, images)) or len(labels) not in (0, 1, len(boxes)):
        raise BadSample("json: 'objects' with 'ref' and 'bbox': expected lists, as many labels as boxes, or one for all")
    found = []
    for number, box in enumerate(boxes):
        one: dict[str, Any] = {"point" if isinstance(box, list) and len(box) == 2 else "bbox": box}
        if labels:
            one["label"] = labels[number if len(labels) == len(boxes) else 0]
        if value.get("bbox_type", "real") != "real":
            one["size"] = {"norm1": [1, 1], "norm1000": [1000, 1000]}.get(value["bbox_type"], value["bbox_type"])
        found.append({**one, **({"image": images[number]} if number < len(images) else {})})
    return found


def read_objects(record: dict[str, Any], sizes: Sequence[Size], orientation: Orientation = lambda image: 1) -> list[Marked]:
    """A record's `objects`; none where it has none.

    Args:
        sizes: (width, height) of each picture, upright.
        orientation: asked only where a size is given that is not the picture's.

    Raises:
        BadSample: one lies outside of its picture by more than a pixel, is inverted, empty or no number, or names no picture.
    """
    value = record.get("objects")
    if value is None or not are_objects(value):
        return []
    given = record.get("objects_size")
    form = next((record[key] for key in FORMATS if isinstance(record.get(key), str)), None)
    return [_read(one, number, given, form, sizes, orientation) for number, one in enumerate(listed(value))]


def unread_object_keys(value: Any) -> set[str]:
    """Keys of a record's `objects` that nothing reads."""
    known = {*KINDS, *LABELS, *FORMATS, "image", "size"}
    given = [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
    return {str(key)[:60] for one in given for key in one if key not in known}


def numbered(value: Any) -> set[str]:
    """Labels of a record's `objects` that are numbers of classes, without the names that they stand for."""
    given = [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
    labels = {one.get("label") for one in given if isinstance(one.get("label"), str)}
    return {f"label {label}" for label in labels if isinstance(label, str) and label.strip().isdecimal()}


def _corners(points: list[Point], form: Any, where: str) -> list[Point]:
    """Two corners, also where the second is a width and a height."""
    if form is None or form in CORNERS:
        return points
    if form in WIDTHS:
        (x, y), (width, height) = points
        return [(x, y), (x + width, y + height)]
    raise BadSample(f"{where}: the form of its bbox is {str(form)[:40]!r}; expected one of {', '.join((*CORNERS, *WIDTHS))}")


def _read(one: dict[str, Any], number: int, given: Any, form: Any, sizes: Sequence[Size], orientation: Orientation) -> Marked:
    where = f"objects[{number}]"
    kinds: list[Kind] = [kind for kind in KINDS if one.get(kind) is not None]
    if len(kinds) != 1:
        raise BadSample(f"{where}: has {' and '.join(kinds) or 'no place'}; expected one of bbox, point and polygon")
    label, image = next((one[key] for key in LABELS if one.get(key) is not None), ""), one.get("image", 0)
    if not isinstance(label, str):
        raise BadSample(f"{where}: label is {str(label)[:40]!r}; expected a text")
    if not isinstance(image, int) or isinstance(image, bool) or not 0 <= image < len(sizes):
        raise BadSample(f"{where}: image is {str(image)[:40]!r}; the sample has {len(sizes)} pictures, counted from 0")
    kind, size = kinds[0], sizes[image]
    points = _numbers(one[kind], kind, where)
    if kind == "bbox":
        points = _corners(points, next((one[key] for key in FORMATS if one.get(key) is not None), form), where)
    if kind == "bbox" and not (points[0][0] < points[1][0] and points[0][1] < points[1][1]):
        raise BadSample(f"{where}: bbox {one[kind]} is inverted or empty; expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    other = one.get("size", given)
    if other is None and all(0 <= x <= 1 and 0 <= y <= 1 for x, y in points) and any(x % 1 or y % 1 for x, y in points):
        shown = f"{kind} {str(one[kind])[:80]}"
        how = 'say so: "objects_size": [1, 1] in the record (`data pack --boxes xyxy/1`)'
        raise BadSample(f"{where}: {shown} are shares of the picture, not pixels; {how}")
    if other is not None:
        points = _scaled(points, _size(other, where), size, lambda: orientation(image), where)
        points = _sorted(points) if kind == "bbox" else points
    clipped = [(min(max(x, 0.0), size[0]), min(max(y, 0.0), size[1])) for x, y in points]
    if any(abs(x - x_in) > SLACK or abs(y - y_in) > SLACK for (x, y), (x_in, y_in) in zip(points, clipped, strict=True)):
        of = f" of {other[0]} x {other[1]}" if other is not None else ""
        raise BadSample(
            f"{where}: {kind} {str(one[kind])[:80]}{of} lies outside of its picture, which has {size[0]} x {size[1]} pixels"
            "; `data pack --boxes` reads other numbers than x1, y1, x2, y2 in pixels"
        )
    return Marked(kind, tuple(clipped), text_of(label.strip()), image)


def _numbers(value: Any, kind: Kind, where: str) -> list[Point]:
    """As points; of a polygon also COCO's flat list of numbers."""
    if kind == "polygon" and isinstance(value, list) and value and all(isinstance(one, list | tuple) for one in value):
        flat = [number for one in value for number in one] if all(len(one) == 2 for one in value) else []
    else:
        flat = list(value) if isinstance(value, list | tuple) else []
    counts = {"bbox": len(flat) == 4, "point": len(flat) == 2, "polygon": len(flat) >= 6 and len(flat) % 2 == 0}
    if not counts[kind] or not all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in flat):
        form = {"bbox": "[x1, y1, x2, y2]", "point": "[x, y]", "polygon": "[[x, y], ...] with three corners or more"}[kind]
        raise BadSample(f"{where}: {kind} is {str(value)[:80]}; expected {form}, all of them numbers")
    return [(float(x), float(y)) for x, y in zip(flat[::2], flat[1::2], strict=True)]


def _size(value: Any, where: str) -> Size:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in value)
    ):
        raise BadSample(f"{where}: size is {str(value)[:40]}; expected [width, height] of the picture that its numbers refer to")
    return value[0], value[1]


def _scaled(points: list[Point], given: Size, size: Size, orientation: Callable[[], int], where: str) -> list[Point]:
    """From a picture of `given` size to one of `size`."""
    if given == size:
        return points
    if given not in GRIDS and not _alike(given, size):
        turn = orientation() if given == size[::-1] else 1
        if turn in TURNED:
            return [upright(point, given, turn) for point in points]
        raise BadSample(f"{where}: refers to a picture of {given[0]} x {given[1]}; this one has {size[0]} x {size[1]}, another shape")
    return [(x * size[0] / given[0], y * size[1] / given[1]) for x, y in points]


def _alike(one: Size, other: Size) -> bool:
    """The same shape but for rounding to whole pixels: each side of the smaller is the larger's, reduced, give or take one."""
    small, large = sorted((one, other), key=lambda size: size[0] * size[1])
    return abs(small[0] * large[1] - small[1] * large[0]) <= large[0] + large[1]


def upright(point: Point, size: Size, orientation: int) -> Point:
    """A point of a picture as it is stored, of (width, height) `size` -> of the picture turned as its EXIF orientation (1 to 8) says."""
    (x, y), (width, height) = point, size
    turned = {
        2: (width - x, y), 3: (width - x, height - y), 4: (x, height - y), 5: (y, x), 6: (height - y, x), 7: (height - y, width - x),
        8: (y, width - x),
    }  # fmt: skip
    return turned.get(orientation, point)


def _sorted(points: list[Point]) -> list[Point]:
    xs, ys = zip(*points, strict=True)
    return [(min(xs), min(ys)), (max(xs), max(ys))]
