"""Starts a Triton kernel with little work of the host.

`kernel[grid](...)` looks at every argument anew to find what it compiled for such arguments. Here that is found by a key made of what
Triton specialises on (number type and alignment of pointers; divisibility by 16, one, and width of whole numbers), and the compiled
kernel is called as Triton's own tutorial on softmax calls it.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime import driver

from vlm_kernels.common import INTERPRETED

ALIGNED = 16
_compiled: dict[tuple, Any] = {}


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % ALIGNED == 0
    if type(value) is int:
        return value % ALIGNED == 0, value == 1, value.bit_length() > 31
    return type(value)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`, where `options` are the kernel's constants and Triton's own (`num_warps`, ...)."""
    if INTERPRETED or torch.version.hip:
        kernel[grid](*arguments, **options)
        return
    device = driver.active.get_current_device()
    key = (kernel, device, *map(_kind, arguments), *options.values())
    found = _compiled.get(key)
    if found is None:
        _compiled[key] = kernel[grid](*arguments, **options)
        return
    constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
    found[(*grid, 1, 1)[:3]](*arguments, *constants, stream=driver.active.get_current_stream(device))
