"""4-bit weights on a CPU, whose rows are no multiple of the 64 weights that share a scale."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit

from vlm_dist.models.experts_nf4 import quantise_experts
from vlm_dist.models.experts_product import expert_linear
from vlm_dist.models.rounding import round_to_nf4
from vlm_dist.upstream.bitsandbytes import unpack_across_rows

CPU = torch.device("cpu")
ERROR = 0.08  # mean of NF4 on normal numbers: 0.073; with the scales of other blocks 0.14 and more


@pytest.fixture(autouse=True)
def _unpacks_across_rows():
    unpack_across_rows()


@pytest.mark.parametrize("shape", [(128, 64), (64, 96), (128, 48), (3, 64, 32), (10, 30), (7, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unpacked_is_what_was_packed(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = round_to_nf4(weight, dtype, CPU)
    assert rounded.shape == weight.shape and rounded.dtype == dtype
    assert (rounded.float() - weight.float()).abs().mean() < ERROR
    torch.testing.assert_close(rounded.flatten(), round_to_nf4(weight.flatten(), dtype, CPU).flatten(), rtol=0, atol=0)


def test_a_layer_of_such_rows_computes_with_its_own_weights():
    """Forward and backward: SigLIP's second MLP layer has 4304 features in."""
    layer = Linear4bit(48, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = torch.randn((32, 48), generator=torch.Generator().manual_seed(0))
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    x = torch.randn((4, 48), generator=torch.Generator().manual_seed(1)).requires_grad_()
    rounded = round_to_nf4(weight, torch.float32, CPU)
    y = layer(x)
    torch.testing.assert_close(y, x @ rounded.T)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(y) @ rounded)


@pytest.mark.parametrize("shape", [(5, 64, 48), (2, 64, 32), (3, 64, 96)])
def test_experts_of_such_rows(shape):
    packed = quantise_experts(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    weights = functional.dequantize_4bit(packed.data, packed.quant_state)
    x = torch.randn((2 * shape[0], shape[2]))
    expected = torch.cat([rows @ weight.T for rows, weight in zip(x.split(2), weights, strict=True)])
    torch.testing.assert_close(expert_linear(x, packed, torch.full((shape[0],), 2)), expected)
