"""A picture's bytes -> upright RGB pixels: one decoder for the stream, the collator, `generate` and the chat.

Turned as its EXIF says, transparent parts on white, palettes resolved, CMYK converted, grey of 16 bits scaled to 8 (v >> 8, as Pillow
scales colours of 16 bits; its own conversion would clip).
"""

from __future__ import annotations

import functools
import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlm_dist.errors import BadSample

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
ORIENTATION = 0x0112  # the EXIF tag
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
EXTRANEOUS = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes")  # libjpeg's warning
MOST_FILLER = 16  # bytes that some writers leave between segments; more were skipped because the scan is damaged
STRIP = 2**21  # pixels converted at a time
BOMB = re.compile(r"\((\d+) pixels\)")  # Pillow's own words for a picture of more than twice its limit
OBJECT = re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>")
WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N")  # modes of 16 bits
SIGNATURES = {
    b"GIF8": "a GIF", b"BM": "a BMP", b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"%PDF": "a PDF", b"<svg": "an SVG", b"<?xml": "XML",
    b"<!DOC": "a web page", b"<html": "a web page", b"PK\x03\x04": "a zip file", b"\x1f\x8b": "gzip",
}  # fmt: skip
PICTURE_STARTS = (b"GIF8", b"BM", b"II*\0", b"MM\0*")
HEIC = "a HEIC or AVIF picture"
NEEDS_HEIF = "`pip install 'vlm_dist[heif]'` (or pillow-heif) makes it readable"
Size = tuple[int, int]


def decode_picture(data: bytes, name: str, max_pixels: int, formats: tuple[str, ...] | None = PICTURE_FORMATS) -> Image:
    """Bytes -> RGB picture, upright. The size is checked in the header, before anything is decoded.

    Args:
        formats: Pillow's names of those that are taken; None: all that it can read (of several pages or frames the first).

    Raises:
        BadSample: of another format, too large, or damaged.
    """
    from PIL import Image

    with _as_bad_sample(name, data, formats):
        picture = _open_picture(data, name, max_pixels, formats)
        orientation = picture.getexif().get(ORIENTATION, 1)
        if _is_plain_jpeg(picture):
            picture = Image.fromarray(_decode_jpeg(data))
        if orientation != 1:
            picture.getexif()[ORIENTATION] = orientation
        return as_rgb(picture)


def as_rgb(picture: Image) -> Image:
    """A picture that somebody opened -> RGB, upright, on white.

    Raises:
        ValueError: its samples are numbers of more than 16 bits, which have no agreed white.
    """
    from PIL import ImageOps

    if picture.mode in ("I", "F") and picture.format != "PNG":
        raise ValueError(
            f"a picture of {'floating-point numbers' if picture.mode == 'F' else '32-bit numbers'}; make it one of 8 or 16 bits"
        )
    if picture.mode in ("I", *WIDE_GREY):
        picture = _narrow_grey(picture)
    if picture.getexif().get(ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        return _on_white(picture)
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def decode_pixels(data: bytes, name: str, max_pixels: int) -> torch.Tensor:
    """The same pixels, and errors, as [3, H, W] uint8; without the way through Pillow where there is a shorter one."""
    import numpy as np
    import torch

    with _as_bad_sample(name, data):
        picture = _open_picture(data, name, max_pixels)
        is_upright = picture.getexif().get(ORIENTATION, 1) == 1
        if _is_plain_jpeg(picture) and is_upright:
            return torch.from_numpy(_decode_jpeg(data)).permute(2, 0, 1)
    return torch.from_numpy(np.array(decode_picture(data, name, max_pixels))).permute(2, 0, 1)


def picture_size(data: bytes, name: str, max_pixels: int) -> Size:
    """(width, height) as it stands upright, from the header.

    Raises:
        BadSample: as `decode_picture`, but for damage inside.
    """
    with _as_bad_sample(name, data):
        picture = _open_picture(data, name, max_pixels)
        width, height = picture.size
        return (height, width) if picture.getexif().get(ORIENTATION) in TURNED else (width, height)


def picture_orientation(data: bytes) -> int:
    """EXIF's, 1 to 8, of a picture whose header has been read; 1: upright."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as picture:
        return int(picture.getexif().get(ORIENTATION, 1))


def picture_extension(data: bytes) -> str | None:
    """jpg, png or webp by the file's first bytes; None: none of them."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[8:12] == b"WEBP" else None


def is_picture(data: bytes) -> bool:
    """Whether the first bytes are those of a picture that can be read, converted or at least named."""
    return picture_extension(data) is not None or data.startswith(PICTURE_STARTS) or what_it_is(data) == HEIC


def frames_of(data: bytes) -> int:
    """Frames or pages; 1 where that cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            return getattr(picture, "n_frames", 1)
    except Exception:  # whatever is wrong, decoding says it
        return 1


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that can be read here; HEIF too where pillow_heif is installed. Not those that run a program."""
    from PIL import Image

    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in Image.ID if name not in ("EPS", "WMF"))


def what_it_is(data: bytes) -> str:
    """A file in words, by its first bytes: "a GIF"."""
    if not data:
        return "empty"
    if data[4:8] == b"ftyp":
        return HEIC if data[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"avif", b"msf1") else "a video"
    return next((words for start, words in SIGNATURES.items() if data.startswith(start)), "no picture that is known here")


def _strips(picture: Image) -> Iterator[tuple[int, Image]]:
    """(first row, piece): a large picture is converted in pieces, so that what is only needed on the way does not take its whole size."""
    rows = max(1, STRIP // max(1, picture.width))
    for top in range(0, picture.height, rows):
        yield top, picture.crop((0, top, picture.width, min(picture.height, top + rows)))


def _on_white(picture: Image) -> Image:
    from PIL import Image

    made = Image.new("RGB", picture.size)
    for top, piece in _strips(picture):
        clear = piece.convert("RGBA")
        made.paste(Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB"), (0, top))
    return made


def _narrow_grey(picture: Image) -> Image:
    """16 bits -> 8; the value that stands for transparency becomes white."""
    import numpy as np
    from PIL import Image

    exif, transparent = picture.getexif(), picture.info.get("transparency")
    values = np.empty((picture.height, picture.width), np.uint8)
    for top, piece in _strips(picture):
        wide, place = np.asarray(piece), slice(top, top + piece.height)
        values[place] = (np.clip(wide, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
        if isinstance(transparent, int):
            values[place][wide == transparent] = 255
    narrow = Image.fromarray(values)
    if exif.get(ORIENTATION, 1) != 1:
        narrow.getexif()[ORIENTATION] = exif[ORIENTATION]
    return narrow


def _is_plain_jpeg(picture: Image) -> bool:
    return picture.format == "JPEG" and picture.mode in ("L", "RGB")


def _decode_jpeg(data: bytes) -> np.ndarray:
    """[H, W, 3] uint8: the same pixels as Pillow's, in less time; and where the file is damaged inside, this says so (Pillow gives grey
    from there on)."""
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, strict=True)
    except ValueError as warning:
        filler = EXTRANEOUS.search(str(warning))
        if filler is None or int(filler[1]) > MOST_FILLER:
            raise
        return simplejpeg.decode_jpeg(data, strict=False)


def _open_picture(data: bytes, name: str, max_pixels: int, formats: tuple[str, ...] | None = PICTURE_FORMATS) -> Image:
    """Reads the header only."""
    from PIL import Image

    try:
        picture: Any = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        pixels = int(found[1]) if (found := BOMB.search(str(error))) else 0
        if pixels > max_pixels:
            raise BadSample(f"{name}: {pixels:,} pixels, more than data.max_image_pixels={max_pixels:,}") from None
        raise BadSample(f"{name}: {pixels:,} pixels, more than Pillow opens ({2 * (Image.MAX_IMAGE_PIXELS or 0):,})") from None
    if picture.width * picture.height > max_pixels:
        raise BadSample(f"{name}: {picture.width} x {picture.height} pixels, more than data.max_image_pixels={max_pixels:,}")
    return picture


@contextmanager
def _as_bad_sample(name: str, data: bytes, formats: tuple[str, ...] | None = PICTURE_FORMATS) -> Iterator[None]:
    """Whatever a decoder raises on odd bytes is a fault of the sample."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except BadSample:
        raise
    except UnidentifiedImageError:
        found = what_it_is(data)
        advice = "expected a JPEG, PNG or WebP file (`vlm-dist data pack` converts others)"
        if formats != PICTURE_FORMATS:
            is_damaged = data.startswith(PICTURE_STARTS) or picture_extension(data) is not None
            advice = "damaged or cut short" if is_damaged else "expected a picture that Pillow can read"
            advice = NEEDS_HEIF if found == HEIC else advice
        raise BadSample(f"{name}: {found}; {advice}") from None
    except MemoryError:
        raise BadSample(f"{name}: cannot be decoded (not enough memory)") from None
    except Exception as error:  # Pillow's plugins raise whatever they like: OSError, SyntaxError, struct.error, OverflowError, ...
        words = OBJECT.sub("it", (str(error).splitlines() or [type(error).__name__])[0][:120])
        raise BadSample(f"{name}: cannot be decoded ({words})") from None
