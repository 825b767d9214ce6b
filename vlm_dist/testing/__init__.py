"""Tiny real checkpoints, for tests of this project and of its users: the real architecture built from a config with random weights, its
real processor and chat template, and a tokenizer trained on the spot. A few hundred kilobytes; no download.

    from vlm_dist.testing import tiny_checkpoint
    tiny_checkpoint("qwen2_5_vl", "checkpoints/tiny")
"""

from __future__ import annotations

from pathlib import Path

from vlm_dist.errors import ModelError
from vlm_dist.families import FAMILIES

__all__ = ["tiny_checkpoint", "tiny_families"]


def tiny_checkpoint(family: str, path: str | Path, seed: int = 0) -> Path:
    """Write a checkpoint of `family` (a name of `tiny_families()`) into the folder `path`; the same seed gives the same weights.

    Returns:
        The folder.

    Raises:
        ModelError: there is no builder for this family.
    """
    import torch

    from vlm_dist.testing.builders import BUILDERS

    if family not in BUILDERS:
        raise ModelError(f"tiny_checkpoint: no builder for '{family}'; there are: {', '.join(BUILDERS)}")
    torch.manual_seed(seed)
    processor, model = BUILDERS[family]()
    # a head of the size that training gives it: with the usual 0.02, no logit could rise above its neighbours
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.25)
    row = FAMILIES[model.config.model_type]
    for name, parameter in model.named_parameters():
        if "bias" not in name and not parameter.any():  # gates and projections that start at zero would hide what is behind them
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim == 2 and row.side_of(name) == "projector":  # keeps the size of its input: the picture then counts
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    tokenizer = processor.tokenizer
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return Path(path)


def tiny_families() -> list[str]:
    """The names that `tiny_checkpoint` knows."""
    from vlm_dist.testing.builders import BUILDERS

    return list(BUILDERS)
