"""How a model is shown videos: by its processor's own road for them, or as pictures with their times (`video` in families.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_dist.config_model import VideoConfig
from vlm_dist.data.video import Clip, Shown
from vlm_dist.errors import BadSample
from vlm_dist.families import FAMILIES
from vlm_dist.upstream.transformers import model_types_of

Messages = list[dict[str, Any]]
SET = "data: {video: {fps: 2, max_frames: 64}}"


class VideoWay:
    """Of one processor.

    Args:
        config: which frames are shown; None: videos are refused.
    """

    def __init__(self, processor: Any, config: VideoConfig | None):
        rows = [FAMILIES[kind] for kind in model_types_of(processor) if kind in FAMILIES]
        self.name = next((row.video for row in rows), "")
        self._architectures = ", ".join(row.model_type for row in rows) or type(processor).__name__
        self._given = config
        self.config = config or VideoConfig()
        if self.name == "fixed":
            self.config = self.config.model_copy(update={"min_frames": self.config.max_frames})

    @property
    def is_on(self) -> bool:
        """Whether this model is shown videos in this run."""
        return self._given is not None and self.name != ""

    @property
    def is_own(self) -> bool:
        """Whether they take the processor's own road."""
        return self.is_on and self.name != "frames"

    def check(self, clips: Sequence[Clip]) -> None:
        """Raises:
        BadSample: there are videos, and this model takes none, or this run does not.
        """
        if not clips or self.is_on:
            return
        if not self.name:
            raise BadSample(f"{clips[0].name}: a video, and {self._architectures} takes none; docs/models.md names the models that do")
        raise BadSample(f"{clips[0].name}: a video, and data.video is not set; to train on videos: {SET}")

    def written(self, messages: Messages, clips: Sequence[Clip | Shown]) -> Messages:
        """The conversation as the chat template gets it: for models that are shown pictures, each frame with its time before it."""
        if self.name != "frames" or not clips:
            return messages
        coming = iter(clips)

        def parts(part: dict[str, Any]) -> Messages:
            if part["type"] != "video":
                return [part]
            clip = next(coming)
            times = clip.times if isinstance(clip, Shown) else clip.times(self.config)
            return [one for time in times for one in ({"type": "text", "text": f"Frame {float(time):.1f}s: "}, {"type": "image"})]

        return [{**message, "content": [one for part in message["content"] for one in parts(part)]} for message in messages]

    def pictures(self, messages: Messages, pictures: Sequence[Any], frames: Sequence[Sequence[Any]]) -> list[Any]:
        """What stands in the places for pictures of `written`: a conversation's own ones, and each video's frames."""
        if self.name != "frames" or not frames:
            return list(pictures)
        own, shown = iter(pictures), iter(frames)
        found: list[Any] = []
        for kind in (part["type"] for message in messages for part in message["content"]):
            found += [next(own)] if kind == "image" else next(shown) if kind == "video" else []
        return found

    def arguments(self, shown: Sequence[Shown]) -> dict[str, Any]:
        """For the processor's call, where it has a road of its own."""
        if not shown or self.name == "frames":
            return {}
        metadata = [metadata_of(one.times, one.duration, (one.frames.shape[3], one.frames.shape[2])) for one in shown]
        return {"videos": [one.frames for one in shown], "video_metadata": metadata, "do_sample_frames": False}

    def blank(self) -> Shown:
        """A video of black frames, as short as may be."""
        import torch

        count = self.config.max_frames if self.name == "fixed" else 2
        return Shown(torch.zeros(count, 3, 56, 56, dtype=torch.uint8), [number / 2 for number in range(count)], count / 2)


def metadata_of(times: Sequence[float], duration: float, size: tuple[int, int]) -> Any:
    """transformers' description of a video whose unit of frames is the second: so any times can be said."""
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=duration,
        fps=1.0,
        width=size[0],
        height=size[1],
        duration=duration,
        frames_indices=list(times),  # pyright: ignore[reportArgumentType]
    )
