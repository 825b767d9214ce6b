"""Objects drawn over pictures, for the page of `vlm-dist inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm_dist.data.boxes import Marked
from vlm_dist.data.frames import Frame

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = ("#15d06a", "#ff2fb0", "#2f9bff", "#ffb000", "#b06bff", "#00c8c8")
HALO = "#000000"


def with_marks(picture: Image, objects: Sequence[Marked], frame: Frame) -> Image:
    """A copy of a picture with its objects outlined and named.

    Args:
        picture: of any size; it shows `frame` of the picture that the objects' numbers refer to.
    """
    from PIL import ImageDraw

    shown = picture.convert("RGB")
    draw = ImageDraw.Draw(shown)
    across, down = shown.width / frame.width, shown.height / frame.height
    line = max(3, round(max(shown.size) / 130))
    for number, one in enumerate(objects):
        colour = COLOURS[number % len(COLOURS)]
        points = [((x - frame.left) * across, (y - frame.top) * down) for x, y in one.points]
        for ink, width in ((HALO, line + 2), (colour, line)):
            _outline(draw, one.kind, points, ink, width)
        if one.label:
            _name(draw, one.label[:40], min(points, key=sum), colour, max(13, max(shown.size) // 26))
    return shown


def _outline(draw, kind: str, points: list[tuple[float, float]], ink: str, width: int) -> None:
    if kind == "point":
        (x, y), radius = points[0], 2 * width
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=ink, width=width)
        return
    if kind == "bbox":
        (x1, y1), (x2, y2) = points
        points = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    draw.line([*points, points[0]], fill=ink, width=width, joint="curve")


def _name(draw, label: str, corner: tuple[float, float], colour: str, size: int) -> None:
    """Black on the colour, from the upper left corner inwards."""
    box = draw.textbbox(corner, label, font_size=size)
    draw.rectangle((*corner, box[2] + size // 3, box[3] + size // 4), fill=colour)
    draw.text((corner[0] + size // 6, corner[1]), label, fill=HALO, font_size=size)
