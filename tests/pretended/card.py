"""A GPU that is not there: tensors that lie in this computer's memory, and say `cuda` of themselves.

Inside `pretended_card()` a storage is either on the card or not. `tensor.device` says which; `.to`, `.cuda` and every constructor's
`device=` put it there; an operation that meets both raises what a real card raises. The numbers are real: forward, backward, optimizer
and evaluation run, and come out as they would on a CPU. What cannot be seen this way: kernels of CUDA's own libraries, streams, memory.

Modes belong to a thread: what other threads compute is on the CPU, as the preparer's threads are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import safetensors.torch
import torch
import torch._dynamo  # before anything of torch is replaced: it lists torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.pretended.attention import by_lengths

CARD, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
CAPABILITY, MEMORY = (9, 0), 80 << 30
CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
aten = torch.ops.aten
ANY_DEVICE = {aten.copy_, aten._to_copy, aten.set_, aten.is_same_size}
"""Take tensors of two devices."""
LIFTED = {aten.lift_fresh, aten.lift}
"""What torch.tensor made, without a word before."""
CPU_INDICES = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
"""Take indices on the CPU beside values on a card."""


BACKWARD = {"gradient": "grad_tensors"}
"""What Tensor.backward's arguments are called in torch.autograd.backward."""


def on_card(tensor: torch.Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "on_card", False)


def device_of(tensor: torch.Tensor) -> torch.device:
    return CARD if on_card(tensor) else META if tensor.is_meta else CPU


class _Devices(TorchDispatchMode):
    """Refuses operations on both devices, and marks what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: torch.device | None = None
        self.makes_here = False
        self.arguments = _Arguments(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = any(on_card(tensor) for tensor in given)
        if func.overloadpacket not in ANY_DEVICE:
            self._refuse_both(func, args, given, here)
        generator, wanted = kwargs.get("generator"), self.wanted
        if (device := kwargs.get("device")) is not None and device.type == "cuda":
            kwargs, wanted = {**kwargs, "device": CPU}, device
        is_to_be = wanted.type == "cuda" if wanted is not None else here or (self.makes_here and not given)
        if generator is not None and is_to_be and not getattr(generator, "on_card", False):
            raise RuntimeError(f"{func}: Expected a 'cuda' device type for generator but found 'cpu'")
        known = set() if func.overloadpacket in LIFTED else {tensor.untyped_storage()._cdata for tensor in given}
        if func.namespace in ("vlm_kernels", "vlm_dist", "bitsandbytes"):  # Python inside: looked into, too
            with self.wanting(None), self.arguments, self:
                return func.redispatch(CPU_KEYS, *args, **kwargs)
        result = by_lengths(func, args) if func.namespace == "torch_attn" else func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if is_to_be and isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in known:
                    storage.on_card = True  # type: ignore[attr-defined]
        return result

    @contextlib.contextmanager
    def wanting(self, device: torch.device | None) -> Iterator[None]:
        """Where what is made inside shall lie."""
        before, self.wanted = self.wanted, device
        try:
            yield
        finally:
            self.wanted = before

    @contextlib.contextmanager
    def making(self, here: bool) -> Iterator[None]:
        """Whether what torch's own C++ makes inside, without another tensor, lies on the card: it goes by the tensors it was given."""
        before, self.makes_here = self.makes_here, here
        try:
            yield
        finally:
            self.makes_here = before

    @staticmethod
    def _refuse_both(func: Any, args: tuple, given: list[torch.Tensor], here: bool) -> None:
        if not here:
            return
        if func.overloadpacket in CPU_INDICES:
            given = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
        away = [tensor for tensor in given if tensor.dim() and not on_card(tensor) and not tensor.is_meta]
        if away and any(on_card(tensor) for tensor in given):
            raise RuntimeError(
                f"{func}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu "
                f"(the one on the CPU: {tuple(away[0].shape)} {away[0].dtype})"
            )


def _is_device(value: Any) -> bool:
    return isinstance(value, (torch.device, str)) or (isinstance(value, int) and not isinstance(value, bool))


class _Arguments(TorchFunctionMode):
    """Takes devices out of calls before torch would look for a real card."""

    def __init__(self, devices: _Devices):
        super().__init__()
        self.devices = devices

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "empty":  # tests put another one in its place
            kwargs.pop("pin_memory", None)
        if func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return self._move(func, args, kwargs)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and on_card(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        if func is torch.Tensor.backward:  # what it recomputes needs this mode, too
            with self, self, self.devices.making(True):  # one of the two is used up by torch.autograd.backward
                return torch.autograd.backward(*args, **{BACKWARD.get(name, name): value for name, value in kwargs.items()})
        device = kwargs.get("device")
        if device is None or torch.device(device).type not in ("cuda", "cpu"):
            if func is torch.autograd.backward:
                return func(*args, **kwargs)
            with self.devices.making(any(isinstance(one, torch.Tensor) and on_card(one) for one in tree_leaves((args, kwargs)))):
                return func(*args, **kwargs)
        with self.devices.wanting(torch.device(device)):
            return func(*args, **{**kwargs, "device": CPU})

    def _move(self, func: Any, args: tuple, kwargs: dict) -> Any:
        tensor, *rest = args
        device = CARD if func is torch.Tensor.cuda else CPU if func is torch.Tensor.cpu else kwargs.pop("device", None)
        if func is torch.Tensor.cuda:
            rest = [one for one in rest if not _is_device(one)]
        elif rest and _is_device(rest[0]):
            device = CARD if isinstance(rest[0], int) else torch.device(rest[0])
            rest = rest[1:]
        elif rest and isinstance(rest[0], torch.Tensor):
            device, rest = device_of(rest[0]), [rest[0].dtype, *rest[1:]]
        elif rest and rest[0] is None:
            rest = rest[1:]
        device = torch.device(device) if device is not None else device_of(tensor)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("memory_format",) or func is torch.Tensor.to}
        if device.type == "meta" or tensor.is_meta:
            return torch.Tensor.to(tensor, device, *rest, **kwargs)
        if device.type != device_of(tensor).type:
            kwargs["copy"] = True
        if rest or kwargs:
            kwargs.pop("non_blocking", None)
            rest = [one for one in rest if not isinstance(one, bool)]
        with self.devices.wanting(device):
            return torch.Tensor.to(tensor, CPU, *rest, **kwargs)


class _Event:
    def __init__(self, *_: Any, **__: Any):
        self.at = 0.0

    def record(self, *_: Any) -> None:
        import time

        self.at = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return 1000 * (other.at - self.at)

    def is_capturing(self) -> bool:
        return False

    def query(self) -> bool:
        return True

    def synchronize(self, *_: Any) -> None:
        pass

    wait = wait_event = wait_stream = record_event = synchronize


class _Stream(_Event):
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _properties(*_: Any) -> SimpleNamespace:
    return SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=MEMORY, multi_processor_count=132, major=9, minor=0, gcnArchName="", warp_size=32
    )


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _of_cuda() -> dict[str, Any]:
    """torch.cuda as one H100 would answer."""
    values: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True, "get_device_capability": CAPABILITY,
        "get_device_name": _properties().name, "mem_get_info": (MEMORY - (1 << 30), MEMORY), "memory_allocated": 1 << 20,
        "max_memory_allocated": 2 << 20, "memory_reserved": 4 << 20, "max_memory_reserved": 4 << 20, "is_bf16_supported": True,
        "can_device_access_peer": True, "memory_stats": {}, "is_current_stream_capturing": False,
    }  # fmt: skip
    none = ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all", "_lazy_init", "init",
            "reset_max_memory_allocated", "ipc_collect")  # fmt: skip
    found: dict[str, Any] = {name: (lambda *_, value=value, **__: value) for name, value in values.items()}
    found |= dict.fromkeys(none, _nothing)
    found |= {
        "get_device_properties": _properties, "Event": _Event, "Stream": _Stream, "current_stream": _Stream, "default_stream": _Stream,
        "stream": lambda *_: contextlib.nullcontext(), "device": lambda *_: contextlib.nullcontext(),
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": _nothing, "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": _nothing,
    }  # fmt: skip
    return found


_OF_ACCELERATOR: dict[str, Any] = {
    "is_available": lambda: True, "current_accelerator": lambda *_, **__: torch.device("cuda"), "device_count": lambda: 1,
    "current_device_index": lambda: 0, "current_stream": _Stream, "synchronize": _nothing, "empty_cache": _nothing,
}  # fmt: skip


def _over_gloo(start: Callable) -> Callable:
    """NCCL asks for real cards."""
    return lambda backend=None, *arguments, **options: start(backend and "gloo", *arguments, **options)


class _OpenedHere:
    """safetensors' file, whose Rust would ask a real card for memory."""

    def __init__(self, path: Any, framework: str, device: Any = "cpu", **options: Any):
        self.file, self.device = safetensors.safe_open(path, framework, device="cpu", **options), device

    def __enter__(self) -> _OpenedHere:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name).to(self.device)


def _autocast_here(enter: Callable) -> Callable:
    """autocast("cuda") reaches the tensors, which torch itself takes for a CPU's."""

    def entered(self: Any) -> Any:
        result = enter(self)
        if self.device == "cuda":
            self.here = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            torch.set_autocast_enabled("cpu", self._enabled)
            torch.set_autocast_dtype("cpu", self.fast_dtype)
        return result

    return entered


def _autocast_gone(leave: Callable) -> Callable:
    def left(self: Any, *error: Any) -> Any:
        if self.device == "cuda":
            torch.set_autocast_enabled("cpu", self.here[0])
            torch.set_autocast_dtype("cpu", self.here[1])
        return leave(self, *error)

    return left


@contextlib.contextmanager
def pretended_card() -> Iterator[None]:
    """One H100 that computes with this CPU."""
    devices = _Devices()
    with contextlib.ExitStack() as stack:
        for name, value in _of_cuda().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in _OF_ACCELERATOR.items():
            stack.enter_context(mock.patch.object(torch.accelerator, name, value))
        tensor: Any = torch.Tensor
        for name, get in {"device": device_of, "is_cuda": on_card, "is_cpu": lambda t: device_of(t).type == "cpu"}.items():
            stack.enter_context(mock.patch.object(tensor, name, property(get), create=True))
        stack.enter_context(mock.patch.object(tensor, "pin_memory", lambda t, *_: t))  # in the stream's thread, too
        stack.enter_context(mock.patch.object(tensor, "record_stream", lambda *_: None))
        stack.enter_context(mock.patch.object(tensor, "get_device", lambda t: 0 if on_card(t) else -1))
        stack.enter_context(mock.patch.object(torch.autocast, "__enter__", _autocast_here(torch.autocast.__enter__)))
        stack.enter_context(mock.patch.object(torch.autocast, "__exit__", _autocast_gone(torch.autocast.__exit__)))
        stack.enter_context(mock.patch.object(safetensors.torch, "safe_open", _OpenedHere))
        start = torch.distributed.init_process_group
        stack.enter_context(mock.patch.object(torch.distributed, "init_process_group", _over_gloo(start)))
        stack.enter_context(mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}))
        stack.enter_context(devices.arguments)
        stack.enter_context(devices)
        yield
