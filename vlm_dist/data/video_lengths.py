"""How many tokens and patches a video becomes, from its header: by the processor's own words for it, without any pixel."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from vlm_dist.data.encode import Encoder
from vlm_dist.data.encoded import VIDEO_PIXELS, count_patches
from vlm_dist.data.video import Clip, Shown, grey_clip
from vlm_dist.data.video_ways import metadata_of

PROBES = ((4, (64, 48)), (6, (200, 120)))  # (frames, (width, height)) on which the rule is compared with what the processor does
CLIP = {"type": "video"}


class VideoRuler:
    """Of one encoder. A processor's `replace_video_token` writes what stands for a video; it is asked with the numbers that it looks at.
    Where the answer is not what the processor does with black frames, black frames are processed for each shape that is met."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self._tried: dict[Any, tuple[int, int]] = {}

    def measure(self, clip: Clip) -> tuple[int, int]:
        """(tokens beside those of the rendered text, patches)."""
        config = self.encoder.videos.config
        times, size = [float(time) for time in clip.times(config)], clip.size(config)
        if self._rule_is_right:
            return self._by_rule(times, float(clip.duration), size)
        key = len(times), size
        if key not in self._tried:
            self._tried[key] = self._by_trying(grey_clip(clip).shown(config))
        return self._tried[key]

    def _by_trying(self, shown: Shown) -> tuple[int, int]:
        message = {"role": "user", "content": [CLIP]}
        encoded = self.encoder.encode_prompt([message], [], videos=[shown])
        return encoded.length - self.encoder.count_text([message], add_generation_prompt=True), count_patches(encoded.inputs)

    def _by_rule(self, times: list[float], duration: float, size: tuple[int, int]) -> tuple[int, int]:
        import torch

        processor, (width, height) = self.encoder.processor, size
        seen: dict[str, Any] = {"video_metadata": [metadata_of(times, duration, size)], VIDEO_PIXELS: [torch.empty(len(times))]}
        count = getattr(processor.video_processor, "get_num_of_video_patches", None)
        if count is not None:
            patches, steps = count(len(times), height, width, {}), -(-len(times) // processor.video_processor.temporal_patch_size)
            seen["video_grid_thw"] = torch.tensor([[steps, patches // steps, 1]])
        else:
            frame = self._shape_of_a_frame
            patches, seen[VIDEO_PIXELS] = len(times) * frame[1] * frame[2] // (14 * 14), [torch.zeros(1).expand(len(times), *frame)]
        words = processor.replace_video_token(seen, video_idx=0)
        return self._tokens(words) - 1, patches

    def _tokens(self, words: str) -> int:
        """Runs of one placeholder are counted, not tokenised."""
        tokenizer = self.encoder.processor.tokenizer
        placeholder = next(token for token in (self.encoder.processor.video_token, self.encoder.processor.image_token) if token in words)
        runs = len(re.findall(f"(?:{re.escape(placeholder)})+", words))
        short = re.sub(f"(?:{re.escape(placeholder)})+", lambda _: placeholder, words)
        return len(tokenizer(short, add_special_tokens=False)["input_ids"]) + words.count(placeholder) - runs

    @cached_property
    def _shape_of_a_frame(self) -> tuple[int, ...]:
        """[3, H, W], where all frames become one size."""
        inputs = self.encoder.encode_prompt([{"role": "user", "content": [CLIP]}], [], videos=[self.encoder.videos.blank()]).inputs
        return tuple((inputs[VIDEO_PIXELS] if VIDEO_PIXELS in inputs else inputs["pixel_values"]).shape[-3:])

    @cached_property
    def _rule_is_right(self) -> bool:
        import torch

        for frames, (width, height) in PROBES:
            times = [number / 2 for number in range(frames)]
            shown = Shown(torch.zeros(frames, 3, height, width, dtype=torch.uint8), times, frames / 2)
            try:
                told = self._by_rule(times, frames / 2, (width, height))
            except (AttributeError, KeyError, NotImplementedError, TypeError, StopIteration, ValueError):
                return False
            if told != self._by_trying(shown):
                return False
        return True
