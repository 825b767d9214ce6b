"""What synthetic pictures and videos are drawn with: colours, shapes, grounds, and which split a scene belongs to."""

from __future__ import annotations

import hashlib
import random

COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 62),
    "blue": (40, 90, 220),
    "yellow": (245, 205, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
SCALE = 4  # shapes are drawn so many times larger and reduced: smooth edges
HELDOUT_SHARE = 0.15


def split_of(scene: object) -> str:
    """The split that a scene (its shapes, or the text to read) belongs to, by a hash of the scene alone."""
    digest = hashlib.sha256(repr(scene).encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") / 2**64 < HELDOUT_SHARE else "train"


def background(rng: random.Random) -> tuple[int, int, int]:
    grey = rng.randrange(190, 256)
    red, green, blue = (max(0, min(255, grey + rng.randrange(-12, 13))) for _ in range(3))
    return red, green, blue


def draw_shape(draw, shape: str, x: float, y: float, r: float, colour: tuple[int, int, int] | int) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        side = r * 0.88
        draw.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r * 0.85), (x + r, y + r * 0.85)], fill=colour)
    else:
        arm = r * 0.34
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)
