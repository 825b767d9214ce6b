"""What the kernels share: where they run, and how large a block is."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The interpreter runs kernels on CPU tensors, for tests. Triton reads the variable once, when it is imported."""
LONGEST_ROW = 65536
"""Elements of the longest row that one program holds."""


@dataclass(frozen=True)
class Compilation:
    """One compilation of a kernel, for the ahead-of-time check: as the launcher would make it for a real model."""

    kernel: Any
    shape: str
    """What it is for, e.g. "hidden 4096"."""
    pointers: dict[str, str]
    """Argument -> Triton type, e.g. {"X": "*bf16", "N": "i32"}."""
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    options: dict[str, Any] = field(default_factory=dict)
    least: int = 0
    """NVIDIA's compute capability, times ten, below which the launcher takes another way."""


_counting = False  # a plain global: torch.compile reads it without breaking the graph


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Fake tensors, which have a shape and no data, take the kernels' path: to count what a GPU would hold and compute where there is
    none. (torch.compile for a CPU traces with them too, so this must be said.)"""
    global _counting
    before, _counting = _counting, True
    try:
        yield
    finally:
        _counting = before


def runs_kernel(tensor: torch.Tensor) -> bool:
    """Whether a tensor goes to the Triton kernel; else to the PyTorch path."""
    return tensor.is_cuda or INTERPRETED or is_counted(tensor)


AMPERE = 80
"""Compute capability, times ten, from which Triton multiplies tiles on tensor cores; on older cards it does so element by element, with
the tiles in local memory."""


def multiplies_tiles(tensor: torch.Tensor) -> bool:
    """Whether a kernel with `tl.dot` is of use where a tensor lies; else PyTorch's own product."""
    if not tensor.is_cuda:
        return True
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor >= AMPERE


def is_counted(tensor: torch.Tensor) -> bool:
    """Whether it is fake and stands for one on a GPU (`as_on_gpu`): there is nothing to launch a kernel on."""
    return _counting and isinstance(tensor, FakeTensor)


def remember(y: torch.Tensor, make: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> None:
    """`make(*tensors)` gives y again, and these are kept for the backward pass anyway: who would keep y for it need not."""
    if not torch.compiler.is_compiling():
        y.made_of = make, tensors  # pyright: ignore[reportAttributeAccessIssue]


Source = tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]


def source_of(x: torch.Tensor) -> Source | None:
    """(make, tensors) that `make(*tensors)` gives x again from; None: x must be kept itself."""
    known = getattr(x, "made_of", None)
    return None if known is None else (known[0], tuple(tensor.detach() for tensor in known[1]))


@functools.cache
def row_block(columns: int) -> tuple[int, int]:
    """(BLOCK, num_warps) of a program that holds a whole row.

    Raises:
        ValueError: the row is longer than a program can hold.
    """
    if columns > LONGEST_ROW:
        raise ValueError(f"a row of {columns} elements; these kernels take up to {LONGEST_ROW}")
    block = triton.next_power_of_2(max(columns, 1))
    return block, min(16, max(4, block // 512)) if block >= 2048 else 4


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., N] -> [M, N] whose rows are contiguous; a view where that is possible."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def programs_for(rows: int, device: torch.device) -> int:
    """Programs that share `rows` where each keeps a running sum: a few for each multiprocessor."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(rows, 4 * processors))


def triton_type(dtype: torch.dtype) -> str:
    """Triton's name of a pointer to it, for `Compilation`."""
    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int64: "*i64"}
    return names[dtype]


def check_same_shape(name: str, tensors: Sequence[torch.Tensor]) -> None:
    """
    Raises:
        ValueError: the shapes differ.
    """
    if len({tuple(tensor.shape) for tensor in tensors}) > 1:
        raise ValueError(f"{name}: shapes differ: {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}")
