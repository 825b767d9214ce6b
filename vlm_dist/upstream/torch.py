"""torch: the names that its own fake tensors, dispatcher and storages have no public word for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = ["FakeTensor", "FakeTensorMode", "TorchDispatchMode", "disable_modes", "tree_leaves"]
SEEN = "2.13.0"
NAMES = (
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.utils._pytree.tree_leaves",
    "torch.UntypedStorage._cdata",
    "torch.ops.aten._unsafe_index.Tensor",
    "torch.ops.aten._unsafe_view.default",
    "torch.ops.aten._unique2.default",
    "torch.ops.aten._local_scalar_dense.default",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
    "torch._ops.OpOverload.overloadpacket",
    "torch._C._distributed_c10d",
    "torch.distributed.distributed_c10d._set_pg_timeout",
    "torch.distributed.distributed_c10d._world.pg_map",
)
aten = torch.ops.aten
unsafe_index = aten._unsafe_index.Tensor
unsafe_view = aten._unsafe_view.default
unique = aten._unique2.default
local_scalar = aten._local_scalar_dense.default
cpu_attention = aten._scaled_dot_product_flash_attention_for_cpu
cpu_attention_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
disable_modes = _disable_current_modes


def storage_key(storage: torch.UntypedStorage) -> int:
    """The same for every view of one storage, and for no other that lives."""
    return storage._cdata


def own_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """A module's own parameters by name, those that are None too: writing to it replaces them."""
    return module._parameters


def own_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """The same of its buffers."""
    return module._buffers


def flight_record() -> str | None:
    """NCCL's flight recorder, where torch keeps one (TORCH_FR_BUFFER_SIZE): the last collectives and their state."""
    dump: Any = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_nccl_trace_json", None)
    return str(dump()) if torch.cuda.is_available() and dump is not None else None


def let_collectives_wait(seconds: float, *, but: Any = None) -> None:
    """Every process group that there is, but for one, gives its collectives so long. (Those that a library makes have torch's own default:
    10 minutes for NCCL.)"""
    from torch.distributed import distributed_c10d as c10d

    for group in c10d._world.pg_map:
        if group is not but:
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)
