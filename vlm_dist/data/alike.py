"""Which pictures are one: those of the same decoded pixels, whatever their names; or, where asked, those that look alike.

Alike: perceptual hashes (64 signs of a discrete cosine transform of the grey picture, after Zauner 2010, "Implementation and benchmarking
of perceptual image hash functions") that differ in few bits, and about the same colours in the same places: scaled or encoded anew, a
picture stays alike to itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

SIDE, KEPT = 32, 8  # of the grey picture, and of the corner of its transform
GRID = 4  # fields on a side whose mean colours are compared
FAINT = 2.0  # coefficients below count as zero: a plain picture has nothing else
BITS, COLOURS = 6, 24  # most that hashes, and colours of a field (of 255), of pictures that are alike differ by
BANDS = 8  # of a hash; with fewer differing bits than bands one band is the same


@dataclass(frozen=True)
class Look:
    """What is compared of a picture."""

    pixels: bytes
    """Digest of its size and decoded pixels."""
    hash: int
    """64 bits."""
    colours: bytes
    """Mean RGB of each field, row by row."""


def look_at(picture: Image) -> Look:
    """Of a decoded picture."""
    import numpy as np
    from PIL import Image as Images

    picture = picture.convert("RGB")
    digest = hashlib.blake2b(f"{picture.width} x {picture.height}".encode() + picture.tobytes(), digest_size=16).digest()
    grey = np.asarray(picture.convert("L").resize((SIDE, SIDE), Images.Resampling.LANCZOS), dtype=np.float64)
    waves = np.cos(np.pi / SIDE * (np.arange(SIDE) + 0.5)[None] * np.arange(KEPT)[:, None]) * (2 / SIDE) ** 0.5
    corner = (waves @ grey @ waves.T).reshape(-1)
    corner = np.where(np.abs(corner) < FAINT, 0.0, corner)
    bits = corner > np.median(corner[1:])
    colours = picture.resize((GRID, GRID), Images.Resampling.BOX).tobytes()
    return Look(digest, int.from_bytes(np.packbits(bits).tobytes(), "big"), colours)


def groups(shown: Sequence[Sequence[Look | str]], *, near: bool = False) -> list[int]:
    """Of each record the number of the first one that shows a picture of its own, directly or through others.

    Args:
        shown: the pictures of each record; of one that cannot be looked at its name.
        near: pictures that look alike are one too.
    """
    first: dict[Any, int] = {}
    leader = list(range(len(shown)))

    def find(number: int) -> int:
        while leader[number] != number:
            leader[number] = leader[leader[number]]
            number = leader[number]
        return number

    def join(one: int, other: int) -> None:
        low, high = sorted((find(one), find(other)))
        leader[high] = low

    looks: dict[bytes, Look] = {}
    for number, pictures in enumerate(shown):
        for picture in pictures:
            key = picture if isinstance(picture, str) else picture.pixels
            if isinstance(picture, Look):
                looks.setdefault(picture.pixels, picture)
            join(first.setdefault(key, number), number)
    for one, other in _alike(list(looks.values())) if near else ():
        join(first[one.pixels], first[other.pixels])
    return [find(number) for number in range(len(shown))]


def _alike(looks: list[Look]) -> Iterator[tuple[Look, Look]]:
    """Pairs that look alike; some more than once."""
    import numpy as np

    hashes = np.array([look.hash for look in looks], dtype=np.uint64)
    colours = np.array([list(look.colours) for look in looks], dtype=np.int16)
    for band in range(BANDS):
        keys = (hashes >> np.uint64(8 * band)) & np.uint64(255)
        order = np.argsort(keys, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            for place in range(len(members) - 1):
                for other in _near(members[place], members[place + 1 :], hashes, colours):
                    yield looks[members[place]], looks[other]


def _near(one: int, others: np.ndarray, hashes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    import numpy as np

    close = others[np.bitwise_count(hashes[others] ^ hashes[one]) <= BITS]
    return close[np.abs(colours[close] - colours[one]).max(1, initial=0) <= COLOURS]
