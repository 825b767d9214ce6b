"""Silence, by name, the messages of libraries that a user can do nothing about. None of ours is touched."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings

from vlm_dist.redaction import redact_log


def quiet_libraries() -> None:
    """Call once, before the heavy libraries are imported. From then on what the log prints holds no secrets."""
    redact_log()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch 2.13 tells of each store that is gone in a page of C++; we in a line
    _hide_folder("kernels")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # says that this package is not installed
    logging.getLogger("DeepSpeed").addFilter(_not_about_accelerator)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    # torch: raised inside DeepSpeed and peft on every start
    warnings.filterwarnings("ignore", message=".*torch.utils._pytree.*", category=FutureWarning)
    # torch 2.13: DeepSpeed calls these by their old names at ZeRO stage 3
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor). is deprecated", category=FutureWarning)
    # Pillow: its own limit of pixels; ours is checked on the same header
    warnings.filterwarnings("ignore", message=".*could be decompression bomb.*")
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*", category=UserWarning)


def _hide_folder(name: str) -> None:
    """With the repository's folder on the path, its `kernels/` would pass for Hugging Face's optional package of that name."""
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is not None and spec.origin is None:  # a folder without code
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]


def _not_about_accelerator(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()
