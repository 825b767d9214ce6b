"""An architecture without a row in the families table -> a row, found by transformers' common names."""

from __future__ import annotations

import re
from typing import Any

from vlm_dist.errors import ModelError
from vlm_dist.families import FAMILIES, Family
from vlm_dist.upstream.transformers import takes_pictures, writes_text

PROJECTOR = re.compile(r"(projector|projection|connector|merger|aligner|adapter|adaptor|resampler|abstractor|embed_vision|mm_proj)")

POOLS = re.compile(r"PoolingHead$")  # SigLIP's; a vision-language model takes the patches


def find_family(model_type: str, hf_config: Any, trust_remote_code: bool = False) -> Family:
    """The row of an architecture: from the table, or read off its module names (no weights are needed).

    Raises:
        ModelError: it is no vision-language model, cannot be built here, or its parts have uncommon names; says what is missing.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    import torch
    from transformers import AutoModelForImageTextToText

    brings_code = trust_remote_code and "AutoModelForImageTextToText" in getattr(hf_config, "auto_map", {})
    if not brings_code and not takes_pictures(hf_config):
        raise ModelError(f"model: {_what_it_is(model_type, hf_config)}; give a vision-language one, such as {', '.join(sorted(FAMILIES))}")
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(hf_config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a model's code raises whatever it likes where a package or a setting is missing
        what = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"model: architecture '{model_type}' cannot be built from its config.json here: {what[:300]}") from error
    return infer_family(model, model_type)


def family_of(model: Any) -> Family:
    """The row of a loaded model: from the table, or read off its modules."""
    return FAMILIES.get(model.config.model_type) or infer_family(model, model.config.model_type)


def infer_family(model: Any, model_type: str) -> Family:
    """Read a row off a model's modules.

    Raises:
        ModelError: vision tower, projector, language model or head was not found.
    """
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    vision = names.get(id(model.get_encoder("image")), "")
    language = names.get(id(model.get_decoder()), "")
    head = names.get(id(model.get_output_embeddings()), "")
    around = vision.rpartition(".")[0]
    projector: list[str] = []
    for name in names.values():
        if not name or name == vision or name.startswith(language + ".") or any(name.startswith(other + ".") for other in projector):
            continue
        parent, _, leaf = name.rpartition(".")
        if parent in (around, vision) and PROJECTOR.search(leaf) and "audio" not in leaf:
            projector.append(name)
    parts = {"vision tower": vision, "language model": language, "output head": head, "projector": projector}
    if missing := [part for part, found in parts.items() if not found]:
        raise ModelError(
            f"model: architecture '{model_type}' has no row in vlm_dist/families.py, and its {' and '.join(missing)} has no common name; "
            "add a row (one line; docs/models.md says how)"
        )
    unused = tuple(name for name, module in model.named_modules() if name.startswith(vision + ".") and POOLS.search(type(module).__name__))
    return Family(model_type, vision, tuple(sorted(projector)), language, head=head, unused=unused)


def _what_it_is(model_type: str, hf_config: Any) -> str:
    if writes_text(hf_config):
        return f"'{model_type}' is a text-only language model (model.mini_vlm joins one with a vision encoder)"
    return f"'{model_type}' is no image-text-to-text architecture"
