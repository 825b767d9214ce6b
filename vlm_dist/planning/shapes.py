"""Running a model's own code on tensors without data, and counting what it holds, computes and moves.

Floating-point tensors are fake (torch's FakeTensorMode): a shape, a dtype, no memory. Integers and masks are real: they say how many
picture tokens there are, which rows are supervised and where windows begin, and models read them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from vlm_dist.models.patching_loss import as_on_gpu
from vlm_dist.planning.costs import RULES
from vlm_dist.planning.counts import Count, Operation, nbytes_of
from vlm_dist.upstream.torch import (
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    cpu_attention,
    cpu_attention_backward,
    local_scalar,
    storage_key,
    tree_leaves,
    unique,
    unsafe_index,
    unsafe_view,
)

aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, unsafe_index)
# What a comparison of numbers that are not there is taken to give: pictures are no padding, nothing is infinite.
COMPARED = {aten.eq: False, aten.ne: True, aten.isnan: False, aten.isinf: False, aten.isfinite: True}
IN_FLOAT32 = (torch.nn.functional.layer_norm, torch.nn.functional.softmax, torch.nn.functional.log_softmax, torch.softmax)
"""What autocast computes in float32 on a GPU and not on a CPU."""
FREE = {
    aten.detach, aten.lift_fresh, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    unsafe_view.overloadpacket, torch.ops.prim.device,
}  # fmt: skip
"""What launches nothing: questions to a tensor, other views of it, memory that is not yet written."""
IN_PLACE = {aten.addmm_: aten.addmm}
"""Products that torch's table of FLOPs has under another name."""
READS = {
    aten.nonzero,
    aten.unique_consecutive,
    aten.masked_select,
    aten.repeat_interleave,
    local_scalar.overloadpacket,
    unique.overloadpacket,
}
"""Whose result's size or value the host waits for."""


class Tally(TorchDispatchMode):
    """Counts what runs inside, on tensors with data."""

    def __init__(self, part: Callable[[], str] = str) -> None:
        super().__init__()
        self.count = Count()
        self.part = part
        self._held: dict[int, tuple[int, str]] = {}
        self._kept = 0
        self._on_host: set[int] = set()

    @property
    def held(self) -> Counter[str]:
        """Bytes held now, by the part of the model that made them."""
        found: Counter[str] = Counter()
        for nbytes, part in self._held.values():
            found[part] += nbytes
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = self.perform(func, args, kwargs, given)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if given and all(map(self.is_on_host, given)):
            for tensor in made:
                self.leave_on_host(tensor)
            return result
        if waits(func, args, kwargs):
            self.wait(func.overloadpacket.__name__)
        if not func.is_view and func.overloadpacket not in FREE:
            self._add_work(func, args, kwargs, result, [*given, *made])
        for tensor in made:
            self.hold(tensor)
        return result

    def perform(self, func: Any, args: tuple, kwargs: dict, given: list[torch.Tensor]) -> Any:
        return func(*args, **kwargs)

    def wait(self, name: str) -> None:
        """The host waits for the device's answer to this."""
        self.count.waits[f"{self.part()} {name}".strip()] += 1

    def leave_on_host(self, tensor: torch.Tensor) -> None:
        """What is made of this tensor and others like it is the host's affair: no launch, no wait, none of the device's memory."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in self._on_host:
            self._on_host.add(key)
            weakref.finalize(storage, self._on_host.discard, key)

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        return storage_key(tensor.untyped_storage()) in self._on_host

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's memory until nothing holds it."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in self._held:
            self._held[key] = storage.nbytes(), self.part()
            self.use(storage.nbytes())
            weakref.finalize(storage, self._let_go, key)

    def use(self, nbytes: int, *, briefly: bool = False) -> None:
        """Memory that is taken, or needed for a moment beside what is held."""
        count = self.count
        count.peak = max(count.peak, count.live + nbytes)
        count.live += 0 if briefly else nbytes

    def keep(self, nbytes: int) -> None:
        """A buffer that all share, as large as the largest that was asked for."""
        self.use(max(0, nbytes - self._kept))
        self._kept = max(self._kept, nbytes)

    def _let_go(self, key: int) -> None:
        self.count.live -= self._held.pop(key)[0]

    def _add_work(self, func: Any, args: tuple, kwargs: dict, result: Any, tensors: list[torch.Tensor]) -> None:
        flops = flop_registry.get(IN_PLACE.get(func.overloadpacket, func.overloadpacket))
        number = flops(*args, **kwargs, out_val=result) if flops else ATTENTION.get(func, _none)(args)
        moved = sum(nbytes_of(tensor) for tensor in tensors)
        if moved:
            self.launch(func, int(number), moved)

    def launch(self, func: Any, flops: int, moved: int) -> None:
        """Count one operation."""
        self.count.work[Operation(self.part(), func.overloadpacket.__name__, flops, moved)] += 1


class Shapes(Tally):
    """The same on tensors without data. Use it through `counting`."""

    def __init__(self, on_gpu: bool, part: Callable[[], str] = str):
        super().__init__(part)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.on_gpu = on_gpu

    def perform(self, func: Any, args: tuple, kwargs: dict, given: list[torch.Tensor]) -> Any:
        if not given:
            return self._construct(func, args, kwargs)
        if not any(isinstance(tensor, FakeTensor) for tensor in given):
            return func(*args, **kwargs)
        name = func.overloadpacket
        if name in COMPARED:
            return torch.full(torch.broadcast_shapes(*(tensor.shape for tensor in given)), COMPARED[name])
        rule = RULES.get(name)
        return rule(self, func, args, kwargs) if rule else self.run(func, _with_places(func, args), kwargs)

    def without_data(self, tensor: torch.Tensor) -> Any:
        """Of a batch's tensor the shape; integers as they are, and a list of numbers (seconds of a video's grid) as Python's: models read
        both."""
        if not tensor.is_floating_point():
            return tensor
        return tensor.tolist() if tensor.ndim == 1 else self.fake.from_tensor(tensor)

    def made(self, make: Callable[[], Any]) -> Any:
        """Fake tensors that `make` constructs."""
        with self.fake:
            return make()

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """An operation on shapes. The mode is called, not entered: entering looks for CUDA's libraries each time."""
        return self.fake.__torch_dispatch__(func, (), args, kwargs)

    def _construct(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Numbers without data; integers and masks as they are."""
        fake = self.run(func, args, kwargs)
        if not isinstance(fake, torch.Tensor) or fake.is_floating_point():
            return fake
        return func(*args, **{**kwargs, "device": "cpu"} if "device" in kwargs else kwargs)


class _AsOnGpu(TorchFunctionMode):
    """What a GPU does otherwise than a CPU: attention without a matrix of scores, and some functions in float32 under autocast."""

    def __init__(self, on_gpu: bool, shapes: Shapes):
        super().__init__()
        self.on_gpu, self.shapes = on_gpu, shapes

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and not self.shapes.is_on_host(args[0]):  # of tensors on the CPU no dispatcher hears
            self.shapes.wait("tolist")
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        if self.on_gpu and func in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
            kwargs = {name: value.float() if isinstance(value, FakeTensor) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _attend(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Fused attention, which keeps queries, keys, values (of fewer heads, if they are), its result and a number a row."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
    width = value.shape[-1]
    if width < query.shape[-1]:
        value = torch.nn.functional.pad(value, (0, query.shape[-1] - width))
    result = cpu_attention(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)
    return result[0][..., :width]


@contextmanager
def counting(*, on_gpu: bool, part: Callable[[], str] = str) -> Iterator[Shapes]:
    """Count what runs inside, as a GPU would hold and compute it, or as this CPU does.

    Args:
        part: says which part of the model runs now.
    """
    with ExitStack() as stack:
        shapes = Shapes(on_gpu, part)
        stack.enter_context(shapes)
        stack.enter_context(_AsOnGpu(on_gpu, shapes))
        if on_gpu:
            stack.enter_context(as_on_gpu())
        yield shapes


def _with_places(func: Any, args: tuple) -> tuple:
    """A real mask as an index becomes the places that it chooses: how many they are is known."""
    if func not in INDEXED:
        return args
    places = []
    for index in args[1]:
        is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        places += index.nonzero(as_tuple=True) if is_mask else [index]
    return (args[0], places, *args[2:])


def waits(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether the host must wait for the device: it asks for a number, or for how many there are."""
    if func in INDEXED:
        return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])
    return func.overloadpacket in READS and kwargs.get("output_size") is None


def _none(args: tuple) -> int:
    return 0


def _attention_flops(query: torch.Tensor, key: torch.Tensor, products: int) -> int:
    """Products of [T, D] by [D, S] for each head: scores and result, or in the backward pass those again and the gradients of three."""
    batch, heads, rows, width = query.shape
    return 2 * products * batch * heads * rows * key.shape[2] * width


ATTENTION: dict[Any, Callable[[tuple], int]] = {
    cpu_attention.default: lambda args: _attention_flops(*args[:2], products=2),
    cpu_attention_backward.default: lambda args: _attention_flops(*args[1:3], products=5),
}
