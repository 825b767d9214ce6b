"""Which part of a picture a processor shows, and how large: what a model's coordinates refer to."""

from __future__ import annotations

from typing import Any, NamedTuple

from vlm_dist.data.pictures import Size
from vlm_dist.errors import ConfigError

PROBES = ((64, 48), (640, 360))  # (width, height) on which the rule is compared with what the processor does

MOST_KNOWN = 100_000  # sizes that are remembered


class Frame(NamedTuple):
    """What is shown of a picture, in its own pixels; all of it, but for processors that cut the middle out, or fill it up to a square."""

    left: float
    top: float
    width: float
    height: float
    shown: Size | None = None
    """(width, height) of what the vision tower gets; None: not asked for."""


class Frames:
    """Of one processor.

    Args:
        absolute: also tell the size that it resizes to.

    Raises:
        ConfigError: that is asked for, and it cuts pictures into tiles, or does not tell.
    """

    def __init__(self, image_processor: Any, *, absolute: bool = False):
        self._processor = image_processor
        self._known: dict[tuple[Size, bool], Frame] = {}
        self._by_rule = False
        if absolute and not hasattr(image_processor, "merge_size"):
            raise ConfigError(
                f"data.boxes: absolute: {type(image_processor).__name__} has no single size that it resizes a picture to; take thousand"
            )
        self._absolute = absolute
        if absolute:
            self._by_rule = all(_by_rule(image_processor, size) == _by_trying(image_processor, size) for size in PROBES)

    def of(self, size: Size, several: bool = False) -> Frame:
        """Of a picture of (width, height), alone or one of several."""
        if (size, several) not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            frame = _visible(self._processor, size, several)
            rule = _by_rule if self._by_rule else _by_trying
            self._known[size, several] = frame._replace(shown=rule(self._processor, size)) if self._absolute else frame
        return self._known[size, several]


def _visible(processor: Any, size: Size, several: bool) -> Frame:
    """All of it; or what CLIP's processor leaves, which cuts the middle out of the resized picture; or the square that LLaVA's fill it up
    to. Those of LLaVA-NeXT and OneVision cut tiles, of which one is the whole picture; OneVision's fills up instead where there are
    several."""
    width, height = size
    cuts_tiles = hasattr(processor, "image_grid_pinpoints")
    if hasattr(processor, "pad_to_square") and (several if cuts_tiles else processor.do_pad):
        side = max(size)
        return Frame(-((side - width) // 2), -((side - height) // 2), side, side)
    crop = getattr(processor, "crop_size", None)
    if not getattr(processor, "do_center_crop", False) or not crop or cuts_tiles:
        return Frame(0, 0, width, height)
    resized = _resized(processor, size)
    kept = (crop["width"], crop["height"])
    left, top = ((whole - part) // 2 * side / whole for whole, part, side in zip(resized, kept, size, strict=True))
    return Frame(left, top, kept[0] * width / resized[0], kept[1] * height / resized[1])


def _resized(processor: Any, size: Size) -> Size:
    """Before the middle is cut out."""
    wanted = processor.size
    if not getattr(processor, "do_resize", True):
        return size
    if wanted.get("shortest_edge"):
        short, long = sorted(size)
        edge = wanted["shortest_edge"]
        far = int(edge * long / short)
        return (edge, far) if size[0] <= size[1] else (far, edge)
    return wanted["width"], wanted["height"]


def _by_rule(processor: Any, size: Size) -> Size | None:
    """Qwen2-VL's, which its successors kept."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    least, most = processor.size.get("shortest_edge"), processor.size.get("longest_edge")
    if not least or not most:
        return None
    try:
        height, width = smart_resize(size[1], size[0], processor.patch_size * processor.merge_size, min_pixels=least, max_pixels=most)
    except ValueError:  # too long and narrow: the processor says so when it encodes
        return size
    return width, height


def _by_trying(processor: Any, size: Size) -> Size:
    """By what the processor says of a blank picture."""
    from PIL import Image

    _, rows, columns = processor(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][0].tolist()
    return columns * processor.patch_size, rows * processor.patch_size
