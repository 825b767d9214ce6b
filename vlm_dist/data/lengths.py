"""How long a sample will be, before any picture or video is decoded: what packing needs to know of samples that it may not choose."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from vlm_dist.data.encode import Encoder
from vlm_dist.data.encoded import count_patches
from vlm_dist.data.pictures import Size
from vlm_dist.data.video import Clip
from vlm_dist.data.video_lengths import VideoRuler
from vlm_dist.errors import BadSample, words_of
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
        self._videos = VideoRuler(encoder)
        self._picture = lru_cache(100_000)(self._by_rule if self._rule_is_right() else self._by_trying)

    def measure(
        self, messages: list[dict[str, Any]], sizes: list[Size], tools: list[Any] | None = None, videos: Sequence[Clip] = ()
    ) -> Length:
        """A conversation about pictures of these sizes (width, height) and these videos.

        Raises:
            BadSample: there are videos, and this model or this run takes none; the text cannot be encoded, or the processor refuses a
                picture of such a size.
        """
        ways = self.encoder.videos
        shown = [[one.size(ways.config)] * len(one.times(ways.config)) for one in videos]
        text = self.encoder.count_text(self.encoder.written(messages, videos), tools)
        sizes = ways.pictures(messages, sizes, shown)
        parts = [self._picture(size, len(sizes) > 1) for size in sizes]
        parts += [Length(*self._videos.measure(one)) for one in videos] if ways.is_own else []
        return Length(text + sum(one.tokens for one in parts), sum(one.patches for one in parts))

    def _by_trying(self, size: Size, among_others: bool) -> Length:
        """Some processors cut a picture into fewer tiles when it is one of several."""
        from PIL import Image

        count = 2 if among_others else 1
        message = {"role": "user", "content": [{"type": "image"}] * count}
        encoded = self.encoder.encode_prompt([message], [Image.new("RGB", size)] * count)
        added = encoded.length - self.encoder.count_text([message], add_generation_prompt=True)
        return Length(added // count, count_patches(encoded.inputs) // count)

    def _by_rule(self, size: Size, among_others: bool) -> Length:
        try:
            told = self._rule(size)
        except Exception as error:  # what a processor does not like of a picture, it says in any way
            raise BadSample(f"processor: {words_of(error)}") from None
        return Length(told + self._besides, round(told * self._patches_a_token))

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
