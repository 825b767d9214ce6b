"""Silence, by name, the messages of libraries that a user can do nothing about. None of ours is touched."""

from __future__ import annotations

import logging
import os
import warnings

from vlm_dist.redaction import redact_log


def quiet_libraries() -> None:
    """Call once, before the heavy libraries are imported. From then on what the log prints holds no secrets."""
    redact_log()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # A repository's `kernels/` folder on the path is no reason to speak of Hugging Face's optional package of that name.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_not_about_accelerator)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    # torch: raised inside DeepSpeed and peft on every start
    warnings.filterwarnings("ignore", message=".*torch.utils._pytree.*", category=FutureWarning)
    # torch 2.13: DeepSpeed calls these by their old names at ZeRO stage 3
    warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor). is deprecated", category=FutureWarning)
    # Pillow: its own limit of pixels; ours is checked on the same header
    warnings.filterwarnings("ignore", message=".*could be decompression bomb.*")
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*", category=UserWarning)


def _not_about_accelerator(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()
