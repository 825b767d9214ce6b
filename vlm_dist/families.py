"""What each architecture calls its parts: one row a `model_type`. A leaf: no torch, so that every layer may read it.

Adding an architecture is adding a row. Paths are dotted attribute names from the model that
`AutoModelForImageTextToText` returns (transformers 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """One architecture's names."""

    model_type: str
    vision: str
    """Path of the vision tower."""
    projector: tuple[str, ...]
    """Paths of what maps vision features into the language model's embedding space; may lie inside `vision`."""
    language: str
    """Path of the language model, without its head."""
    attention: tuple[str, ...] = ("self_attn", "attn", "attention", "cross_attn", "linear_attn")
    """Names of attention modules, on both sides."""
    mlp: tuple[str, ...] = ("mlp", "feed_forward")
    """Names of MLP modules, on both sides."""
    head: str = "lm_head"
    """Path of the output head; never quantised, never adapted."""

    unused: tuple[str, ...] = ()
    """Paths of modules that the checkpoint holds and the model never runs; never adapted."""
    boxes: str = "thousand"
    """How its makers taught it to write boxes and points, a name of `data/conventions.py`; thousand where they document nothing."""
    overflows_in_float16: bool = False
    """Whether its hidden states are known to grow beyond 65,504, the largest float16."""
    tower_takes_sizes: bool = False
    """Whether the vision tower takes from outside what follows from the pictures' sizes alone (models/ahead.py)."""
    video: Literal["", "timed", "fixed", "frames"] = ""
    """How it is shown videos: by its processor's own road, any number of frames (timed) or always `data.video.max_frames` of them (fixed:
    the videos of a batch must be equally long); as pictures with their times before them (frames); not at all."""
    packs: bool = False
    """Whether several samples may share a row without one seeing another (tests/models/test_packing.py shows it by their losses)."""

    two_way: bool = False
    """Whether the tokens of a picture see one another both ways, which lengths of samples alone do not say."""

    caches: bool = False
    """Whether the vision tower takes pictures of one size, one a row, and the model reads one of its outputs (models/features.py)."""

    cuts: bool = False
    """Whether a row may be cut over several ranks (tests/models/test_sequence.py shows it by losses and gradients)."""

    def side_of(self, name: str) -> str:
        """The side that a module or parameter belongs to: vision, projector or language (the head counts as language)."""
        for side, paths in (("projector", self.projector), ("vision", (self.vision,))):
            if any(name == path or name.startswith(path + ".") for path in paths):
                return side
        return "language"


LLAVA_PARTS = ("model.vision_tower", ("model.multi_modal_projector",), "model.language_model")
IDEFICS_PARTS = ("model.vision_model", ("model.connector",), "model.text_model")
QWEN_PARTS = ("model.visual", ("model.visual.merger",), "model.language_model")
QWEN3_PARTS = ("model.visual", ("model.visual.merger", "model.visual.deepstack_merger_list"), "model.language_model")
SIGLIP_HEAD = ("model.vision_tower.head",)  # SigLIP pools with it; a vision-language model takes the patches
FAMILIES = {
    row.model_type: row
    for row in (
        Family(
            "gemma3", *LLAVA_PARTS, unused=SIGLIP_HEAD, packs=True, two_way=True, cuts=True, caches=True, boxes="gemma",
            overflows_in_float16=True, video="frames",
        ),
        Family(
            "gemma4", "model.vision_tower", ("model.embed_vision",), "model.language_model", packs=True, two_way=True, cuts=True,
            boxes="gemma", video="timed",
        ),
        Family("glm4v", *QWEN_PARTS, packs=True, cuts=True, video="frames"),
        Family("glm4v_moe", *QWEN_PARTS, packs=True, cuts=True, video="frames"),
        Family("idefics3", *IDEFICS_PARTS, packs=True, cuts=True, video="frames"),
        Family("internvl", *LLAVA_PARTS, packs=True, cuts=True, caches=True, boxes="internvl", video="fixed"),
        Family("llava", *LLAVA_PARTS, unused=SIGLIP_HEAD, packs=True, cuts=True, caches=True, boxes="unit"),
        Family("llava_next", *LLAVA_PARTS, unused=SIGLIP_HEAD, packs=True, cuts=True, boxes="unit"),
        Family("llava_next_video", *LLAVA_PARTS, unused=SIGLIP_HEAD, packs=True, cuts=True, boxes="unit", video="fixed"),
        Family("llava_onevision", *LLAVA_PARTS, unused=SIGLIP_HEAD, packs=True, cuts=True, boxes="unit", video="fixed"),
        Family(
            "mini_vlm", "model.vision_encoder", ("model.projector",), "model.language_model", head="model.language_model.lm_head",
            packs=True, cuts=True, caches=True, unused=("model.vision_encoder.pooler", "model.vision_encoder.head"),
        ),
        Family("mistral3", *LLAVA_PARTS, packs=True, cuts=True),
        Family("mllama", "model.vision_model", ("model.multi_modal_projector",), "model.language_model"),
        Family("qwen2_5_vl", *QWEN_PARTS, tower_takes_sizes=True, packs=True, cuts=True, boxes="absolute", video="timed"),
        Family("qwen2_vl", *QWEN_PARTS, tower_takes_sizes=True, packs=True, cuts=True, boxes="qwen2", video="timed"),
        Family("qwen3_5", *QWEN_PARTS, tower_takes_sizes=True, video="timed"),
        Family("qwen3_5_moe", *QWEN_PARTS, tower_takes_sizes=True, video="timed"),
        Family("qwen3_vl", *QWEN3_PARTS, tower_takes_sizes=True, packs=True, cuts=True, video="timed"),
        Family("qwen3_vl_moe", *QWEN3_PARTS, tower_takes_sizes=True, packs=True, cuts=True, video="timed"),
        Family("smolvlm", *IDEFICS_PARTS, packs=True, cuts=True, video="frames"),
    )
}  # fmt: skip
