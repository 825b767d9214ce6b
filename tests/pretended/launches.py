"""Triton launches on a card that is not there: the real binder and ptxas with the launcher's own arguments, then Triton's interpreter."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, interpreter
from triton.runtime.jit import JITFunction

from tests.pretended.card import on_card

TARGET = GPUTarget("cuda", 90, 32)
MOST_SHARED = 227 << 10  # bytes a block, sm_90
_numbers = itertools.count(1000)  # Triton keeps what it compiled by the card's number
MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, str], ...]
    num_warps: int
    divisible: str
    """Which arguments were compiled as divisible by 16."""


class Launches(list[Launch]):
    """What was launched, in order."""

    compute = True
    """Whether numbers come out; else what a kernel would write stays unwritten."""


class _Launcher:
    """One compiled kernel."""

    def __init__(self, launches: Launches, source: Any, metadata: Any):
        self.launches, self.source, self.metadata = launches, source, metadata

    def __call__(self, *arguments: Any) -> None:
        """Triton's own order: grid, stream, function, packed metadata, launch metadata, two hooks, then the kernel's arguments."""
        grid, values = arguments[:3], arguments[9:]
        kernel = self.source.fn
        named = dict(zip(kernel.arg_names, values, strict=True))
        name = f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.fn.__name__}"
        for argument, value in named.items():
            if isinstance(value, torch.Tensor) and not on_card(value):
                raise ValueError(f"{name}: Pointer argument {argument} cannot be accessed from Triton (cpu tensor?)")
        if any(number > most for number, most in zip(grid, MOST_PROGRAMS, strict=True)):
            raise RuntimeError(f"{name}: a grid of {grid}; a card takes up to {MOST_PROGRAMS}")
        constants = {kernel.arg_names[path[0]]: value for path, value in self.source.constants.items()}
        signature = tuple((key, kind) for key, kind in self.source.signature.items() if kind != "constexpr")
        self.launches.append(
            Launch(
                name,
                grid,
                signature,
                tuple((key, str(value)) for key, value in constants.items()),
                self.metadata.num_warps,
                str(sorted(self.source.attrs.items())),
            )
        )
        if self.launches.compute and 0 not in grid:
            with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
                interpreter.InterpretedFunction(kernel.fn)[grid](**named)


def _in_interpreter(kernel: Any, *arguments: Any, **options: Any) -> Any:
    """A function that a kernel calls. (InterpretedFunction's own call would leave the language in the interpreter's state.)"""
    scope = interpreter._patch_lang(kernel.fn)
    try:
        return interpreter.InterpretedFunction(kernel.fn).rewrite()(*arguments, **options)
    finally:
        scope.restore()


@contextlib.contextmanager
def pretended_launches() -> Iterator[Launches]:
    """What is launched inside is compiled for sm_90, noted, and computed by the interpreter."""
    launches = Launches()
    card = SimpleNamespace(
        get_current_target=lambda: TARGET,
        get_current_device=lambda: number,
        get_current_stream=lambda _: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        launcher_cls=lambda source, metadata: _Launcher(launches, source, metadata),
        utils=SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (1, 1, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": MOST_SHARED, "multiprocessor_count": 132},
        ),
    )
    number = next(_numbers)
    before = driver._active
    driver.set_active(card)
    try:
        with mock.patch.object(JITFunction, "__call__", _in_interpreter):
            yield launches
    finally:
        driver._active = before
