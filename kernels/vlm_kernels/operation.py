"""What launches a kernel, as an operation on tensors: called as the function that it is where nothing looks on, through torch's dispatcher
where something does (torch.compile, fake tensors, a mode that counts).

A custom op of torch's costs the host more than the launch in it, and a step of a few thousand of them keeps a fast GPU waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

PYTHON = torch._C.DispatchKey.Python
PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_watched(tensor: torch.Tensor) -> bool:
    """Whether something else than the device is to see what is done to it: a compiler, a mode, a tensor without numbers."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return type(tensor) not in PLAIN and torch._C._dispatch_keys(tensor).has(PYTHON)


def bytes_of(codes: torch.Tensor) -> torch.Tensor:
    """A packed weight, stored in any number type, as bytes [n]. (bitsandbytes' parameter is a subclass, which costs the host at each
    question put to it.)"""
    with torch._C.DisableTorchFunctionSubclass():
        return codes.contiguous().view(torch.uint8).flatten()


class Operation:
    """`function`, whose first argument is a tensor; its annotations are the schema of the op `name`, of vlm_kernels if no room is named."""

    def __init__(self, name: str, function: Callable, mutates_args: Iterable[str] = ()):
        self.function = self.direct = function
        self.traced = torch.library.custom_op(name if "::" in name else f"vlm_kernels::{name}", function, mutates_args=set(mutates_args))

    def register_fake(self, function: Callable) -> Callable:
        """What it returns, as shapes alone; as `torch.library.register_fake`."""
        self.traced.register_fake(function)
        return function

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As `torch.library.register_autograd`, for both ways."""
        self.traced.register_autograd(backward, setup_context=setup_context)
        launch = self.function

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):  # pyright: ignore[reportIncompatibleMethodOverride]
                output = launch(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
                return backward(ctx, *grads)

        self.direct = Direct.apply

    def __call__(self, *inputs: Any) -> Any:
        if is_watched(inputs[0]):
            return self.traced(*inputs)
        return self.direct(*inputs) if torch.is_grad_enabled() else self.function(*inputs)


def operation(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable], Operation]:
    """Decorates a function."""
    return lambda function: Operation(name, function, mutates_args)
