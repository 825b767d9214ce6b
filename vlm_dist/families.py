"""What each architecture calls its parts: one row a `model_type`. A leaf: no torch, so that every layer may read it.

Adding an architecture is adding a row. Paths are dotted attribute names from the model that
`AutoModelForImageTextToText` returns (transformers 5).
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm_dist.errors import ModelError

SIDES = ("vision", "projector", "language")


@dataclass(frozen=True)
class Family:
    """One architecture's names."""

    model_type: str
    vision: str
    """Path of the vision tower."""
    projector: str
    """Path of the module that maps vision features into the language model's embedding space; may lie inside `vision`."""
    language: str
    """Path of the language model, without its head."""
    attention: tuple[str, ...] = ("self_attn", "attn")
    """Names of attention modules, on both sides."""
    mlp: tuple[str, ...] = ("mlp",)
    """Names of MLP modules, on both sides."""
    head: str = "lm_head"
    """Path of the output head; never quantised, never adapted."""

    def side_of(self, name: str) -> str:
        """The side that a module or parameter belongs to: vision, projector or language (the head counts as language)."""
        for side, path in (("projector", self.projector), ("vision", self.vision)):
            if name == path or name.startswith(path + "."):
                return side
        return "language"


FAMILIES = {
    row.model_type: row
    for row in (
        Family("llava", "model.vision_tower", "model.multi_modal_projector", "model.language_model"),
        Family("qwen2_vl", "model.visual", "model.visual.merger", "model.language_model"),
        Family("qwen2_5_vl", "model.visual", "model.visual.merger", "model.language_model"),
    )
}


def family_of(model_type: str) -> Family:
    """The row of a `model_type`.

    Raises:
        ModelError: there is none.
    """
    if model_type not in FAMILIES:
        raise ModelError(f"model: architecture '{model_type}' is not supported yet; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
