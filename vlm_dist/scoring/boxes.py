"""Scores of boxes and points in an answer against a sample's objects, both in pixels of the upright picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vlm_dist.data.boxes import Marked, Point
from vlm_dist.data.pictures import Size

NEAR = 0.05  # of the longer side: how far a point may be from one that is a point itself


class Marks(NamedTuple):
    """What a metric with a parameter `marks` gets besides the answer's text."""

    answered: list[Marked]
    """What the answer marks, see `Placing.read`."""
    truth: list[Marked]
    """What it was to mark."""
    sizes: list[Size]
    """(width, height) of each picture."""


def iou(answer: str, truths: Sequence[str], marks: Marks) -> float:
    """Intersection over union of boxes, matched greedily, the best pair first; a box that is missing or too many counts 0. Where the truth
    has several labels, and the answer names them, only boxes of one label are a pair."""
    return _share([overlap for overlap, _, _ in _pairs(marks)], marks)


def box_accuracy(answer: str, truths: Sequence[str], marks: Marks, *, least: float = 0.5) -> float:
    """Share of boxes whose pair (as for `iou`) overlaps by at least `least`. With one object a sample: the accuracy of RefCOCO (Yu et al.
    2016, arXiv:1608.00272; MDETR, arXiv:2104.12763)."""
    return _share([float(overlap >= least) for overlap, _, _ in _pairs(marks)], marks)


def pointing(answer: str, truths: Sequence[str], marks: Marks) -> float:
    """Share of objects that have a point of the answer inside, a point for each (the pointing game, Zhang et al. 2016, arXiv:1608.00507);
    of a box in the answer its centre counts, of a true point a distance of 5 % of the longer side. Points too many count 0."""
    free, hits = list(marks.answered), []
    for one in marks.truth:
        hit = next((given for given in free if given.image == one.image and _is_inside(given.centre, one, marks.sizes[one.image])), None)
        hits.append(float(hit is not None))
        if hit is not None:
            free.remove(hit)
    return _share(hits, marks)


def overlap_of(one: Marked, other: Marked) -> float:
    """Intersection over union of two boxes; of polygons that of their boxes; 0 in different pictures."""
    a, b = one.box, other.box
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if one.image != other.image or width <= 0 or height <= 0:
        return 0.0
    common = width * height
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def _pairs(marks: Marks) -> list[tuple[float, int, int]]:
    """(overlap, number of the true box, number of the answered one), no box in two."""
    strict = len({one.label for one in marks.truth}) > 1 and all(one.label for one in marks.answered)
    candidates = sorted(
        (
            (overlap_of(one, other), i, j)
            for i, one in enumerate(marks.truth)
            for j, other in enumerate(marks.answered)
            if not strict or one.label.casefold() == other.label.casefold()
        ),
        key=lambda pair: (-pair[0], *pair[1:]),
    )
    pairs, seen = [], (set(), set())
    for overlap, i, j in candidates:
        if overlap > 0 and i not in seen[0] and j not in seen[1]:
            pairs.append((overlap, i, j))
            seen[0].add(i)
            seen[1].add(j)
    return pairs


def _share(values: Sequence[float], marks: Marks) -> float:
    return sum(values) / max(len(marks.truth), len(marks.answered), 1)


def _is_inside(point: Point, one: Marked, size: Size) -> bool:
    (x, y), (x1, y1, x2, y2) = point, one.box
    if one.kind == "point":
        return (x - x1) ** 2 + (y - y1) ** 2 <= (NEAR * max(size)) ** 2
    if one.kind == "bbox":
        return x1 <= x <= x2 and y1 <= y <= y2
    inside = False
    for (ax, ay), (bx, by) in zip(one.points, (*one.points[1:], one.points[0]), strict=True):  # how often a ray to the right is crossed
        if (ay > y) != (by > y) and x < (bx - ax) * (y - ay) / (by - ay) + ax:
            inside = not inside
    return inside
