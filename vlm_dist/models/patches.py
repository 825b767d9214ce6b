"""What was put into a model's objects, and how to take it back."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Patches:
    """What was put into a model."""

    counts: Counter[str] = field(default_factory=Counter)
    kept: dict[str, str] = field(default_factory=dict)
    """Kernel -> why some module of the model keeps its own code."""
    _replaced: list[tuple[Any, str]] = field(default_factory=list)

    def put(self, kernel: str, target: Any, name: str, value: Any, *, reads: Callable[[], list] | None = None) -> None:
        """Set an attribute of one object.

        Args:
            reads: gives the parameters of other modules that it reads without calling them; ZeRO-3 is told (training/engine.py).
        """
        for attribute, content in ((name, value), *((("reads_weights", reads),) if reads else ())):
            setattr(target, attribute, content)
            self._replaced.append((target, attribute))
        self.counts[kernel] += 1

    def restore(self) -> None:
        """Take everything back."""
        for target, name in reversed(self._replaced):
            if name in vars(target):
                delattr(target, name)
        self._replaced.clear()
        self.counts.clear()

    def __str__(self) -> str:
        found = ", ".join(f"{number} x {kernel}" for kernel, number in sorted(self.counts.items())) or "none"
        return found + "".join(f"; {kernel}: {reason}" for kernel, reason in sorted(self.kept.items()))


def bind(module: Any, function: Callable, **settings: Any) -> Callable:
    """A forward for one object, with the signature of the object's own (generate() reads that)."""

    @functools.wraps(module.forward)
    def forward(*arguments: Any, **options: Any) -> Any:
        return function(module, *arguments, **settings, **options)

    return forward


def with_names(module: Any, names: dict[str, Any]) -> Callable:
    """A copy of one object's forward that finds other things under these names of its own module."""
    own = vars(module).get("forward")
    forward: Any = own.__func__ if isinstance(own, types.MethodType) else type(module).forward
    ours = types.FunctionType(
        forward.__code__, {**forward.__globals__, **names}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    ours.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(ours, module)
