"""Experts on a card that is not there: one launch for all of them, by torch's grouped_mm or by the kernel, gives the numbers of the CPU's
loop; a card before Ampere loops, too."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from tests.pretended.card import pretended_card
from tests.pretended.launches import pretended_launches
from vlm_dist.models.experts_nf4 import quantise_experts
from vlm_dist.models.experts_product import expert_linear, expert_lora

ROWS, WIDTHS = [4, 0, 5], (24, 64)
KERNELS = {"grouped_linear._linear_kernel", "grouped_linear._outer_kernel"}


def computed(device: str, dtype: torch.dtype, packed: bool, transposed: bool) -> list[torch.Tensor]:
    """Product and low-rank update of experts, one of which gets no token, and all their gradients."""
    torch.manual_seed(0)
    outputs, inputs = WIDTHS[::-1] if transposed else WIDTHS
    x, whole, a, b = torch.randn(9, inputs), torch.randn(3, *WIDTHS), torch.randn(9, inputs), torch.randn(outputs, 9)
    weight: Any = quantise_experts(whole) if packed else whole.to(dtype)
    leaves = [tensor.to(device).requires_grad_() for tensor in (x.to(dtype), a, b)]
    counts = torch.tensor(ROWS, device=device)
    weight = weight.to(device) if packed else weight.to(device).requires_grad_()
    y = expert_linear(leaves[0], weight, counts, transposed=transposed) + expert_lora(*leaves, counts, 0.5)
    leaves += [] if packed else [weight]
    return [y.detach().cpu().float(), *(grad.cpu().float() for grad in torch.autograd.grad(y.square().sum(), leaves))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_experts_compute_what_the_cpu_does(dtype, packed, transposed, capability):
    with pretended_card(), pretended_launches() as launches, mock.patch.object(torch.cuda, "get_device_capability", lambda *_: capability):
        found = computed("cuda", dtype, packed, transposed)
    for one, other in zip(found, computed("cpu", dtype, packed, transposed), strict=True):
        assert (one - other).abs().max() <= {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype] * other.abs().max()
    started = {launch.kernel for launch in launches}
    by_kernel = capability >= (8, 0) and dtype != torch.bfloat16
    assert started - {"nf4_dequantize._kernel"} == (KERNELS if by_kernel else set())
    assert ("nf4_dequantize._kernel" in started) == packed
