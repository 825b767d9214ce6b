"""A picture as a record names it -> its bytes, or a Pillow picture of an array: paths, file:// and data: addresses, base64, bytes,
arrays and tensors, pictures that are open. http(s) addresses only where fetching is allowed.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.data.fetch import Fetcher
from vlm_dist.data.layout_values import source_of
from vlm_dist.data.pictures import is_picture
from vlm_dist.errors import BadSample

if TYPE_CHECKING:
    from PIL.Image import Image

BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
DATA_ADDRESS = re.compile(r"data:([^,]*),", re.IGNORECASE)
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+)://")
SHORTEST_BASE64 = 40  # characters; a file's name of fewer that is not there is a file that is not there


def read_source(source: Any, base: Path = Path(), fetcher: Fetcher | None = None, kind: str = "picture") -> bytes | Image:
    """The bytes of a picture or video; of an array, a tensor or an open picture a Pillow picture.

    Args:
        source: a path, an address, base64, bytes, {"bytes", "path"} or another object that holds one of them, an array or tensor
            ([H, W], [H, W, 3] or [3, H, W]; 0 to 255, or real numbers from 0 to 1), or a Pillow picture.
        base: where relative paths begin.
        fetcher: how http(s) addresses are fetched; None: not at all.
        kind: what it is called in messages.

    Raises:
        BadSample: it cannot be read.
    """
    if isinstance(source, dict):
        if isinstance(source.get("bytes"), bytes | bytearray | memoryview) and len(source["bytes"]):
            return bytes(source["bytes"])
        if isinstance(source.get("bytes"), str) and source["bytes"].strip():
            return from_base64(source["bytes"])
        named = source_of({key: value for key, value in source.items() if key != "bytes" or isinstance(value, str)})
        if named is None or isinstance(named, dict):
            raise BadSample(f"a {kind} is an object with {', '.join(map(str, source)) or 'nothing'}; expected bytes, path, url or base64")
        source = named
    if isinstance(source, str | Path):
        return _from_text(str(source), base, fetcher, kind)
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    from PIL import Image

    return source if isinstance(source, Image.Image) else _from_array(source)


def name_of(source: Any) -> str:
    """A picture in words, for messages."""
    if isinstance(source, dict):
        inner = source.get("path") or source_of({key: value for key, value in source.items() if key != "bytes"})
        return name_of(inner) if isinstance(inner, str) else "in the record"
    if isinstance(source, Path):
        return str(source)
    if not isinstance(source, str):
        return "in the record"
    return source if len(source) <= 200 and not source.startswith("data:") else f"{source[:40]}... in the record"


def _from_text(text: str, base: Path, fetcher: Fetcher | None, kind: str) -> bytes:
    if address := DATA_ADDRESS.match(text[:300].lstrip()):
        payload = text.lstrip()[address.end() :]
        return from_base64(payload) if "base64" in address[1].lower() else urllib.parse.unquote_to_bytes(payload)
    scheme = SCHEME.match(text.strip()[:40])
    if scheme and scheme[1].lower() in ("http", "https"):
        if fetcher is None:
            raise BadSample(f"{kind} {text[:200]!r} is not fetched; --fetch fetches {kind}s from http(s) addresses")
        return fetcher.read(text.strip())
    if scheme and scheme[1].lower() != "file":
        raise BadSample(
            f"{kind} {text[:200]!r}: '{scheme[1]}://' is not read; expected a path, file://, http(s)://, a data: address or base64"
        )
    reason = "empty name"
    for path in paths_of(text.strip()[7:] if scheme else text, base, is_address=scheme is not None):
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            reason = type(error).__name__
        except (OSError, ValueError) as error:  # a name that is too long, or with a zero byte
            reason = type(error).__name__
    if len(text) >= SHORTEST_BASE64 and BASE64.fullmatch(text):
        data = _decoded(text)
        if data is not None and is_picture(data):
            return data
    raise BadSample(f"{kind} {name_of(text)!r} cannot be read below '{base}' ({reason})")


def paths_of(name: str, base: Path, *, is_address: bool = False) -> Iterator[Path]:
    """Where a name may lie: as it stands, then with %20 and its like resolved, backslashes turned, and accents in one or two characters."""
    if len(name) > 4096 or not name.strip():
        return
    name = re.sub(r"^(localhost)?(?=/)", "", name) if is_address else name
    seen: set[str] = set()
    for unquoted in (name, urllib.parse.unquote(name)):
        for turned in (unquoted, unquoted.replace("\\", "/")):
            for form in (turned, unicodedata.normalize("NFC", turned), unicodedata.normalize("NFD", turned)):
                for stripped in (form, form.strip()):
                    if stripped not in seen:
                        seen.add(stripped)
                        yield base / stripped


def from_base64(text: str) -> bytes:
    """Base64 with or without line breaks and padding, in either alphabet.

    Raises:
        BadSample: it is none.
    """
    data = _decoded(urllib.parse.unquote(text) if "%" in text[:4000] else text)
    if not data:
        raise BadSample(f"a picture's base64 cannot be read; it begins {text[:30]!r}")
    return data


def _decoded(text: str) -> bytes | None:
    plain = re.sub(r"\s+", "", text).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def _from_array(value: Any) -> bytes | Image:
    """An array or tensor -> a picture; one of bytes in a row -> these bytes."""
    import numpy as np
    from PIL import Image

    is_tensor = type(value).__module__.partition(".")[0] == "torch"
    try:
        array = np.asarray(value.detach().cpu().float() if is_tensor and value.is_floating_point() else value)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        raise BadSample(f"a picture is a {type(value).__name__}; expected a path, bytes, a picture or an array") from None
    if array.dtype.kind not in "uifb" or not array.size:
        raise BadSample(f"a picture is a {type(value).__name__} of {array.dtype}; expected a path, bytes, a picture or an array of numbers")
    if array.ndim == 1 and array.dtype == np.uint8:
        return array.tobytes()
    return Image.fromarray(_eight_bits(_channels_last(array, first=is_tensor)))


def _channels_last(array: Any, *, first: bool) -> Any:
    """[H, W] or [H, W, channels].

    Args:
        first: channels stand first where either could be meant.
    """
    shape = array.shape
    if array.ndim == 4 and shape[0] == 1:
        return _channels_last(array[0], first=first)
    if array.ndim == 3:
        is_first, is_last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
        if is_first and (first or not is_last):
            array = array.transpose(1, 2, 0)
        elif not is_last:
            raise BadSample(f"a picture is an array of {list(shape)}; expected [H, W], [H, W, 3] or [3, H, W]")
        return array[:, :, 0] if array.shape[2] == 1 else array
    if array.ndim != 2:
        raise BadSample(f"a picture is an array of {list(shape)}; expected [H, W], [H, W, 3] or [3, H, W]")
    return array


def _eight_bits(array: Any) -> Any:
    import numpy as np

    low, high = array.min(), array.max()
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # not for NaN either
            raise BadSample(f"a picture's numbers go from {low:.3g} to {high:.3g}; expected 0 to 1, or 0 to 255")
        array = np.rint(array * 255 if high <= 1 else array)
    elif array.dtype == np.uint16:
        array = array >> 8
    elif low < 0 or high > 255:
        raise BadSample(f"a picture's numbers go from {low} to {high}; expected 0 to 255")
    return np.ascontiguousarray(array.astype(np.uint8))
