"""bitsandbytes: a layer that changes its weights' layout by itself, and a kernel that reads the scales of other blocks."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_longlong
from functools import cache
from math import lcm
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SEEN = "0.50.2"
UNPACKING = [f"cdequantize_blockwise_cpu_{kind}_{dtype}" for kind in ("nf4", "fp4") for dtype in ("fp32", "bf16", "fp16")]
NAMES = (
    "bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.functional.QuantState",
    *(f"bitsandbytes.backends.cpu.ops.lib.{name}" for name in UNPACKING),
)  # fmt: skip


@cache
def unpack_across_rows() -> None:
    """On a CPU, bitsandbytes 0.50 unpacks a 4-bit weight [X, Y] as if blocks began with each row, though it packs across rows: wherever Y
    is no multiple of a block, most scales are those of other blocks, and nothing says so. Its compiled functions get so many rows for
    one as begin with a block. Once a process."""
    from bitsandbytes.backends.cpu.ops import lib

    for name in UNPACKING:
        setattr(lib, name, _across_rows(getattr(lib, name)))


def _across_rows(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def unpack(codes: Any, absmax: Any, out: Any, blocksize: Any, rows: Any, width: Any) -> Any:
        together = lcm(width.value, blocksize.value) // width.value
        together = rows.value if rows.value % together else together
        shape = c_longlong(rows.value // together), c_longlong(width.value * together)
        return theirs(codes, absmax, out, blocksize, *shape)

    return unpack


def keep_nf4_layout(module: Any) -> None:
    """bitsandbytes repacks a Linear4bit in place for a bfloat16 inference kernel the first time it runs in evaluation mode on a CPU with
    AVX512-BF16, and a later training step then runs through that kernel, which has no backward. Evaluating between training steps must
    not change the weights, so the repacking is turned off for this module and all below it."""
    from bitsandbytes.nn.modules import Linear4bit

    for layer in module.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """A checkpoint that is stored in 4 bit brings its own settings, which win over those that it is loaded with: whoever saved it chose
    the number type in which its layers compute, the one that weights are unpacked to, and the one that they are held in (mostly bytes);
    and its other weights stay in the type that they are stored in (transformers 5.23; their biases do not). All of it becomes `dtype`
    here: a layer then computes as the rest of the model does, wherever it is loaded, and ZeRO-3 can shard the weights."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for parameter in model.parameters():
        if not isinstance(parameter, Params4bit):
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        elif parameter.quant_state is not None:
            parameter.quant_state.dtype = dtype
            if parameter.dtype != dtype and parameter.nbytes % dtype.itemsize == 0:
                parameter.data = parameter.data.flatten().view(dtype).unsqueeze(1)
                parameter.quant_storage = dtype
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.quant_storage = layer.weight.dtype
