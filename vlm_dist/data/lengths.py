"""How long a sample will be, before any picture is decoded: what packing needs to know of samples that it may not choose."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from vlm_dist.data.encode import Encoder
from vlm_dist.data.pictures import Size
from vlm_dist.upstream.transformers import picture_token_rule

PROBES = ((64, 48), (640, 360))  # (width, height) on which a processor's own rule is compared with what the processor does


class Length(NamedTuple):
    """Of one sample."""

    tokens: int
    patches: int
    """What the vision tower computes: patches, see `count_patches`."""


class Ruler:
    """Token and patch counts from messages and the sizes of pictures.

    Text is tokenised. What a picture of some size adds is asked of the processor's own rule (see
    `picture_token_rule`) where it has one that agrees with what it does, else found by processing a blank picture of that
    size. Where text around a picture merges with it into other tokens, a count may be off by a few.
    """

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self._told = picture_token_rule(encoder.processor)
        self._picture = lru_cache(100_000)(self._by_rule if self._rule_is_right() else self._by_trying)

    def measure(self, messages: list[dict[str, Any]], sizes: list[Size], tools: list[Any] | None = None) -> Length:
        """A conversation about pictures of these sizes (width, height)."""
        pictures = [self._picture(size, len(sizes) > 1) for size in sizes]
        text = self.encoder.count_text(messages, tools)
        return Length(text + sum(one.tokens for one in pictures), sum(one.patches for one in pictures))

    def _by_trying(self, size: Size, among_others: bool) -> Length:
        """Some processors cut a picture into fewer tiles when it is one of several."""
        from PIL import Image

        count = 2 if among_others else 1
        message = {"role": "user", "content": [{"type": "image"}] * count}
        encoded = self.encoder.encode_prompt([message], [Image.new("RGB", size)] * count)
        added = encoded.length - self.encoder.count_text([message], add_generation_prompt=True)
        return Length(added // count, count_patches(encoded.inputs) // count)

    def _by_rule(self, size: Size, among_others: bool) -> Length:
        return Length(self._rule(size) + self._besides, round(self._rule(size) * self._patches_a_token))

    def _rule(self, size: Size) -> int:
        assert self._told is not None
        return self._told(*size)

    def _rule_is_right(self) -> bool:
        if self._told is None:
            return False
        try:
            told = [self._rule(size) for size in PROBES]
        except (AttributeError, KeyError, NotImplementedError, TypeError):
            return False
        seen = {several: [self._by_trying(size, several) for size in PROBES] for several in (False, True)}
        self._besides = seen[False][0].tokens - told[0]  # the placeholder itself is text, and some families put a word or two around
        self._patches_a_token = seen[False][0].patches / told[0]
        return all(
            length.tokens == number + self._besides and abs(length.patches - number * self._patches_a_token) < 1
            for lengths in seen.values()
            for length, number in zip(lengths, told, strict=True)
        )


def count_patches(inputs: dict[str, Any]) -> int:
    """Pieces that the vision tower computes for a processor's tensors: rows of patches where the processor cuts them (Qwen, Gemma 4),
    else squares of 14 x 14 pixels."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return 0
    return pixels.numel() // pixels.shape[-1] if pixels.ndim <= 3 else pixels.numel() // (pixels.shape[-3] * 14 * 14)
