"""vlm_dist: train vision-language models from tar shards, on one GPU or many, from one YAML.

    import vlm_dist
    config = vlm_dist.load_config("configs/quickstart.yaml", ["optim.lr=1e-3"])
    summary = vlm_dist.train(config)

Importing this package is quick (heavy libraries are imported where they are used) and changes nothing in other libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_dist.config import Config
from vlm_dist.config_load import load_config
from vlm_dist.errors import UserError

if TYPE_CHECKING:
    from vlm_dist.training.train import train
    from vlm_dist.unsloth.collator import VisionDataCollator
    from vlm_dist.unsloth.collator import VisionDataCollator as UnslothVisionDataCollator
    from vlm_dist.unsloth.fast import FastVisionModel
    from vlm_dist.unsloth.sft import SFTConfig, SFTTrainer

__version__ = "0.1.0"
__all__ = [
    "Config",
    "FastVisionModel",
    "SFTConfig",
    "SFTTrainer",
    "UnslothVisionDataCollator",
    "UserError",
    "VisionDataCollator",
    "load_config",
    "train",
]

_LAZY = {
    "FastVisionModel": ("vlm_dist.unsloth.fast", "FastVisionModel"),
    "SFTConfig": ("vlm_dist.unsloth.sft", "SFTConfig"),
    "SFTTrainer": ("vlm_dist.unsloth.sft", "SFTTrainer"),
    "UnslothVisionDataCollator": ("vlm_dist.unsloth.collator", "VisionDataCollator"),
    "VisionDataCollator": ("vlm_dist.unsloth.collator", "VisionDataCollator"),
    "train": ("vlm_dist.training.train", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vlm_dist' has no attribute '{name}'")
    from importlib import import_module

    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
