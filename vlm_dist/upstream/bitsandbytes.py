"""bitsandbytes: a layer that changes its weights' layout by itself."""

from __future__ import annotations

from typing import Any

SEEN = "0.50.2"
NAMES = ("bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.functional.QuantState")


def keep_nf4_layout(module: Any) -> None:
    """bitsandbytes repacks a Linear4bit in place for a bfloat16 inference kernel the first time it runs in evaluation mode on a CPU with
    AVX512-BF16, and a later training step then runs through that kernel, which has no backward. Evaluating between training steps must
    not change the weights, so the repacking is turned off for this module and all below it."""
    from bitsandbytes.nn.modules import Linear4bit

    for layer in module.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
