"""Which settings a processor has: those that nothing reads are refused, because a processor takes any name without a word."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from vlm_dist.errors import ModelError

PARTS = {"self", "image_processor", "tokenizer", "video_processor", "feature_extractor", "chat_template", "args", "kwargs"}
HANDLING = {"data_format", "device", "disable_grouping", "input_data_format", "return_tensors", "return_row_col_info"}
"""Arguments of an image processor that say how tensors are handed over: the collator needs them as they are."""


def known_settings(processor: Any) -> set[str]:
    """Names that `model.processor` may set: arguments of the processor, what is particular to its image processor, and of what all image
    processors share those that this one has a value for.

    Args:
        processor: as its checkpoint has it, without changes.
    """
    from transformers.processing_utils import ImagesKwargs

    images = processor.image_processor
    kinds = getattr(images, "valid_kwargs", ImagesKwargs).__mro__
    own = {name for kind in kinds for name in getattr(kind, "__annotations__", {})}
    shared = set(ImagesKwargs.__annotations__)
    used = {name for name in own | shared if name not in shared or getattr(images, name, None) is not None}
    return (used | set(inspect.signature(type(processor).__init__).parameters)) - PARTS - HANDLING


def check_settings(wanted: dict[str, Any], processor: Any, name: str) -> None:
    """Refuse what this processor does not read.

    Args:
        wanted: `model.processor`.
        processor: as its checkpoint has it.

    Raises:
        ModelError: by name, with those that exist.
    """
    known = known_settings(processor)
    for setting in wanted:
        if setting in known:
            continue
        near = difflib.get_close_matches(setting, known, 1)
        guess = f"did you mean '{near[0]}'? It" if near else "it"
        kind = type(processor.image_processor).__name__
        raise ModelError(f"model.processor: '{setting}' has no effect on '{name}' ({kind}); {guess} reads {', '.join(sorted(known))}")
