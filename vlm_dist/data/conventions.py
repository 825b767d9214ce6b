"""How models write boxes and points into text: one row a convention; which one an architecture has stands in `families.py`.

Sources, each the model makers' own words:

- absolute: Qwen2.5-VL, pixels of the picture as the processor resizes it (QwenLM/Qwen3-VL#931; cookbooks/spatial_understanding.ipynb of
  that repository at Qwen2.5's time; arXiv:2502.13923, section 2.1)
- thousand: Qwen3-VL and 3.5, 0 to 1000 of width and height, whatever the size (cookbooks/2d_grounding.ipynb of QwenLM/Qwen3-VL); also
  the form for architectures whose makers document none
- qwen2: Qwen2-VL, 0 to 1000 between special tokens (arXiv:2409.12191, section 2.3)
- gemma: 0 to 1000, y before x, as Google's models answer (https://ai.google.dev/gemini-api/docs/image-understanding,
  https://ai.google.dev/gemma/docs/capabilities/vision/image)
- internvl: 0 to 1000 between tags (https://internvl.readthedocs.io/en/latest/get_started/chat_data_format.html); its points in the same
  manner, which no page documents
- unit: LLaVA, shares of what is shown with two decimals (haotian-liu/LLaVA#606)
- loc: PaliGemma, tokens <loc0000> to <loc1023>, y before x (https://ai.google.dev/gemma/docs/paligemma/prompt-system-instructions,
  google-research/big_vision, paligemma/README.md)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_dist.data.boxes import Marked, Point
from vlm_dist.data.frames import Frame
from vlm_dist.errors import BadSample

NUMBER = r"-?\d+(?:\.\d+)?"
GROUP = re.compile(rf"[\[(]\s*({NUMBER}(?:\s*,\s*{NUMBER})*)\s*[\])]")
LOCATIONS = re.compile(r"(?:<loc\d{4}>)+")
BARE = re.compile(rf"{NUMBER}(?:[\s,]+{NUMBER})+")
BETWEEN_CORNERS = re.compile(r"\s*,\s*")
JSON_LABEL = re.compile(r'"label"\s*:\s*("(?:[^"\\]|\\.)*")')


@dataclass(frozen=True)
class Convention:
    """One way to write."""

    name: str
    scale: float | None = None
    """What the whole width, and the whole height, count; None: pixels of what the processor shows."""
    decimals: int = 0
    y_first: bool = False
    corner: str = "{}, {}"
    """The two numbers of a point."""
    bbox: str = "[{}, {}]"
    """Around the corners of a box, in a text."""
    point: str = "[{}]"
    polygon: tuple[str, str, str, str] = ("[", "[{}]", ", ", "]")
    """What opens it, each corner, what stands between them, what closes it."""
    label: str = "{}"
    """A label that stands for its object in a text."""
    keys: tuple[str, str] | None = None
    """Of boxes and of points in a list of JSON objects; None: `item`s joined by `joint`."""
    item: str = "{label}{place}"
    joint: str = ""
    before: str = ""
    """Regular expression of a label before its place; special tokens are not in a generated answer any more."""
    most: int | None = None
    """Largest number that can be written."""
    tokens: tuple[str, ...] = ()
    """Special tokens that it writes."""

    def place(self, one: Marked, kind: str, frame: Frame) -> str:
        """A box, point or polygon (`kind`) of an object, in a text.

        Raises:
            BadSample: it lies outside of what the processor shows.
        """
        corners = [self._corner(point, frame) for point in _points(one, kind, frame)]
        if kind == "polygon":
            opens, each, between, closes = self.polygon
            return opens + between.join(each.format(self.corner.format(*corner)) for corner in corners) + closes
        return (self.bbox if kind == "bbox" else self.point).format(*(self.corner.format(*corner) for corner in corners))

    def name_of(self, one: Marked) -> str:
        """Its label, in a text."""
        return self.label.format(one.label)

    def list_of(self, objects: Sequence[Marked], frames: Sequence[Frame]) -> str:
        """All of them, as the model answers when it is asked to detect: points as points, polygons by their boxes."""
        kinds = ["point" if one.kind == "point" else "bbox" for one in objects]
        if self.keys is None:
            named = len(objects) > 1 or self.label != "{}" or self.name == "loc"  # one box alone needs no name where names are plain text
            pairs = zip(objects, kinds, frames, strict=True)
            return self.joint.join(
                self.item.format(label=self.name_of(one) if named and one.label else "", place=self.place(one, kind, frame)).strip()
                for one, kind, frame in pairs
            )
        rows = []
        for one, kind, frame in zip(objects, kinds, frames, strict=True):
            numbers = [json.loads(number) for point in _points(one, kind, frame) for number in self._corner(point, frame)]
            rows.append({self.keys[kind == "point"]: numbers} | ({"label": one.label} if one.label else {}))
        return json.dumps(rows, ensure_ascii=False)

    def read(self, text: str, frames: Sequence[Frame]) -> list[Marked]:
        """Boxes, points and polygons of an answer, in pixels of their pictures; what is inverted is put right.

        Args:
            frames: of the picture that each refers to, in order; the last also for those that follow.
        """
        found: list[Marked] = []
        for numbers, label in self._places(text):
            image = min(len(found), len(frames) - 1)
            pairs = [pair[::-1] if self.y_first else pair for pair in zip(numbers[::2], numbers[1::2], strict=True)]
            points = [self._back(pair, frames[image]) for pair in pairs]
            if len(points) == 2:
                (x1, y1), (x2, y2) = points
                points = [(min(x1, x2), min(y1, y2)), (max(x1, x2), max(y1, y2))]
            kind = ("point", "bbox")[len(points) - 1] if len(points) < 3 else "polygon"
            found.append(Marked(kind, tuple(points), label, 0))  # pyright: ignore[reportArgumentType]
        return found

    def _places(self, text: str) -> Iterable[tuple[list[float], str]]:
        """Numbers of each place, as they are written, and its label."""
        runs = _runs(text)
        for number, (start, end, numbers) in enumerate(runs):
            if len(numbers) % 2:
                continue
            ahead = text[runs[number - 1][1] if number else 0 : start]
            behind = text[end : runs[number + 1][0] if number + 1 < len(runs) else len(text)]
            yield numbers, self._label(ahead, behind)

    def _label(self, ahead: str, behind: str) -> str:
        if self.keys is not None:
            inside = JSON_LABEL.search(behind.split("}")[0]) or JSON_LABEL.search(ahead.rsplit("{", 1)[-1])
            try:
                return json.loads(inside[1]) if inside else ""
            except ValueError:  # an escape that is none
                return ""
        if self.name == "loc":
            return behind.split(";")[0].strip()
        found = re.search(self.before, ahead)
        return found[1].strip() if found else ""

    def _corner(self, point: Point, frame: Frame) -> tuple[str, str]:
        """The two numbers of a point, as they are written."""
        scales = (self.scale, self.scale) if self.scale is not None else frame.shown
        assert scales is not None
        shares = (point[0] - frame.left) / frame.width, (point[1] - frame.top) / frame.height
        values = [share * scale for share, scale in zip(shares, scales, strict=True)]
        if self.most is not None:
            values = [min(value, self.most) for value in values]
        x, y = (f"{value:.{self.decimals}f}" for value in values)
        return (y, x) if self.y_first else (x, y)

    def _back(self, pair: tuple[float, ...], frame: Frame) -> Point:
        scales = (self.scale, self.scale) if self.scale is not None else frame.shown
        assert scales is not None
        return frame.left + pair[0] / scales[0] * frame.width, frame.top + pair[1] / scales[1] * frame.height


def _points(one: Marked, kind: str, frame: Frame) -> tuple[Point, ...]:
    """In the picture's pixels, clipped to what is shown."""
    if kind == "polygon":
        points: tuple[Point, ...] = one.points
    else:
        x1, y1, x2, y2 = one.box
        points = (one.centre,) if kind == "point" else ((x1, y1), (x2, y2))
    right, bottom = frame.left + frame.width, frame.top + frame.height
    clipped = tuple((min(max(x, frame.left), right), min(max(y, frame.top), bottom)) for x, y in points)
    if clipped != points and (kind == "point" or any(min(axis) == max(axis) for axis in zip(*clipped, strict=True))):
        box = ", ".join(f"{number:g}" for number in one.box)
        raise BadSample(
            f"objects: {one.label or one.kind} at [{box}] lies outside of what the processor shows of its picture: "
            f"[{frame.left:g}, {frame.top:g}, {right:g}, {bottom:g}] (it cuts the middle out)"
        )
    return clipped


def _runs(text: str) -> list[tuple[int, int, list[float]]]:
    """(start, end, numbers) of what may be a place: location tokens, numbers in brackets, or pairs in brackets one behind the other; where
    there are none, numbers without brackets."""
    locations = [(found.start(), found.end(), [float(one) for one in re.findall(r"\d{4}", found[0])]) for found in LOCATIONS.finditer(text)]
    if locations:
        return locations
    runs: list[tuple[int, int, list[float]]] = []
    paired = False
    for found in GROUP.finditer(text):
        numbers = [float(one) for one in re.findall(NUMBER, found[1])]
        is_pair = len(numbers) == 2
        if is_pair and paired and BETWEEN_CORNERS.fullmatch(text, runs[-1][1], found.start()):
            runs[-1] = (runs[-1][0], found.end(), runs[-1][2] + numbers)
        else:
            runs.append((found.start(), found.end(), numbers))
        paired = is_pair
    if not runs and (bare := BARE.search(text)):
        numbers = [float(one) for one in re.findall(NUMBER, bare[0])]
        runs = [(bare.start(), bare.end(), numbers)] if len(numbers) in (2, 4) else []
    return runs


CONVENTIONS = {
    row.name: row
    for row in (
        Convention("absolute", keys=("bbox_2d", "point_2d")),
        Convention("thousand", 1000, keys=("bbox_2d", "point_2d")),
        Convention("gemma", 1000, y_first=True, keys=("box_2d", "point")),
        Convention(
            "qwen2", 1000, corner="({},{})", bbox="<|box_start|>{},{}<|box_end|>", point="<|box_start|>{}<|box_end|>",
            polygon=("<|quad_start|>", "{}", ",", "<|quad_end|>"), label="<|object_ref_start|>{}<|object_ref_end|>",
            before=r"([^<>|()]+?)(?:<\|object_ref_end\|>)?(?:<\|box_start\|>)?$",
            tokens=("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
        ),
        Convention(
            "internvl", 1000, bbox="<box>[[{}, {}]]</box>", point="<point>[[{}]]</point>", label="<ref>{}</ref>",
            polygon=("<quad>[", "[{}]", ", ", "]</quad>"), joint="\n", before=r"([^<>\[\]]+?)(?:</ref>)?(?:<(?:box|point)>)?\[*$",
            tokens=("<box>", "</box>", "<quad>", "</quad>", "<ref>", "</ref>"),
        ),
        Convention("unit", 1, 2, item="{label} {place}", joint="; ", before=r"([^;\[\]]+)$"),
        Convention(
            "loc", 1024, y_first=True, corner="<loc{:0>4}><loc{:0>4}>", bbox="{}{}", point="{}", polygon=("", "{}", "", ""),
            item="{place} {label}", joint=" ; ", most=1023, tokens=("<loc#>",),
        ),
    )
}  # fmt: skip


def convention_of(processor: Any, name: str = "auto") -> Convention:
    """The one of that name; auto: location tokens where the tokenizer has them, else as `families.py` says of the architectures that come
    with such a processor, else thousand."""
    from vlm_dist.families import FAMILIES
    from vlm_dist.upstream.transformers import model_types_of

    if name != "auto":
        return CONVENTIONS[name]
    if "<loc1023>" in processor.tokenizer.get_added_vocab():
        return CONVENTIONS["loc"]
    rows = (FAMILIES[kind] for kind in model_types_of(processor) if kind in FAMILIES)
    return CONVENTIONS[next((row.boxes for row in rows), "thousand")]
