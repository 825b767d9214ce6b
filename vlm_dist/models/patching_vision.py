"""Vision towers: their patch embedding as one product, and windows of their attention (Qwen2-VL and its descendants), all of one length
at a time.

transformers hands whole sequences to flash-attention, and to every other implementation one window after another, in a loop in Python: of
a picture of 4,096 patches 64 calls a layer. Windows of equal length are one batch.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from vlm_dist.models.patches import Patches, bind
from vlm_dist.upstream.deepspeed import gathered
from vlm_dist.upstream.transformers import attention_of

NEEDED = ("is_flash_attention_requested", "ALL_ATTENTION_FUNCTIONS", "get_max_seqlen")


def patch_vision_windows(model: Any, patches: Patches) -> None:
    """Attention forwards that loop over windows get a copy of themselves that takes the way of flash-attention, to our function."""
    for module in model.modules():
        forward = type(module).forward
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        if not all(name in names for name in NEEDED) or "cu_seqlens" not in forward.__code__.co_varnames:
            continue
        if "flash" in attention_of(module.config):
            patches.kept["vision_windows"] = "flash-attention takes them at once"
            continue
        ours = types.FunctionType(
            forward.__code__, {**forward.__globals__, **REPLACED}, forward.__name__, forward.__defaults__, forward.__closure__
        )
        ours.__kwdefaults__ = forward.__kwdefaults__
        patches.put("vision_windows", module, "forward", types.MethodType(ours, module))


def attend_in_windows(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, cu_seq_lens_q: torch.Tensor, scaling: float,
    dropout: float = 0.0, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention inside each window, without a mask.

    Args:
        query, key, value: [1, H, N, D]: N patches, H heads.
        cu_seq_lens_q: [W + 1]: where each of W windows begins, and N.

    Returns:
        [1, N, H, D], and None for the weights.
    """
    starts, lengths = cu_seq_lens_q[:-1], cu_seq_lens_q.diff().tolist()
    distinct = sorted(set(lengths) - {0})
    states = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [N, H, D]
    if len(distinct) == 1:
        return _attend(states, distinct[0], scaling, dropout)[None], None
    result = torch.empty_like(states[2], memory_format=torch.contiguous_format)
    for length in distinct:
        chosen = torch.tensor([number for number, one in enumerate(lengths) if one == length], device=starts.device)
        places = (starts[chosen, None] + torch.arange(length, device=starts.device)).flatten()
        result = result.index_copy(0, places, _attend([tensor[places] for tensor in states], length, scaling, dropout))
    return result[None], None


def _attend(states: list[torch.Tensor], length: int, scaling: float, dropout: float) -> torch.Tensor:
    """[N, H, D] in windows of `length` patches each -> [N, H, D]."""
    query, key, value = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in states)
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
    return attended.transpose(1, 2).flatten(0, 1)


def patch_patch_embedding(model: Any, patches: Patches) -> None:
    """A convolution whose kernel covers its whole input is a product of two matrices: so it is of every patch of Qwen's vision towers.
    cuDNN takes 10 to 20 times as long for it as a convolution in three dimensions (pytorch#174051, transformers#45750)."""
    for module in model.modules():
        if type(module) is not torch.nn.Conv3d:
            continue
        if module.stride != module.kernel_size or module.groups != 1 or any(module.padding) or set(module.dilation) != {1}:
            patches.kept["patch_embedding"] = "a convolution whose patches overlap"
        elif not _is_product(module):
            patches.kept["patch_embedding"] = "a convolution that gives other numbers than the product"
        else:
            patches.put("patch_embedding", module, "forward", bind(module, _patches_forward, original=module.forward))


def _patches_forward(module: Any, input: torch.Tensor, *, original: Callable) -> torch.Tensor:
    """[N, C, T, H, W], where the kernel is [T, H, W], -> [N, D, 1, 1, 1]; any other input goes through the convolution."""
    if input.ndim != 5 or input.shape[2:] != module.kernel_size:
        return original(input)
    return torch.nn.functional.linear(input.flatten(1), module.weight.flatten(1), module.bias)[:, :, None, None, None]


def _is_product(module: Any) -> bool:
    with gathered(module.parameters()):
        if module.weight.is_meta:
            return True  # no numbers to compare
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((3, module.in_channels, *module.kernel_size), generator=generator, device="cpu").to(module.weight)
        with torch.no_grad():
            expected = module(x).float()
            difference = _patches_forward(module, x, original=module.forward).float() - expected
    return bool(difference.norm() <= 1e-2 * expected.norm())


REPLACED: dict[str, Any] = {
    "is_flash_attention_requested": lambda *_, **__: True,
    "ALL_ATTENTION_FUNCTIONS": SimpleNamespace(get_interface=lambda *_: attend_in_windows),
    "get_max_seqlen": lambda *_, **__: None,
}
