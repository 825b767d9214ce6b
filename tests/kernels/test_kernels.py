"""Each kernel against its meaning in float64: values and every gradient, odd and empty shapes, strides, precisions.

The same tests run three times: on a CPU through the PyTorch paths; through Triton's interpreter, i.e. the kernels themselves
(tests/kernels/test_interpreter.py starts that process); and on a GPU (`-m gpu`).
"""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlm_kernels as kernels
from vlm_kernels import reference
from vlm_kernels.common import INTERPRETED
from vlm_kernels.geglu import geglu_gradients
from vlm_kernels.nf4_gated_mlp import nf4_gated_mlp
from vlm_kernels.nf4_lora_group import Copies, Layer, nf4_lora_group
from vlm_kernels.swiglu import swiglu_gradients

DEVICES = [
    pytest.param("cpu", id="interpreted" if INTERPRETED else "cpu"),
    pytest.param("cuda", id="gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")]),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative to the largest element of the exact result: rounding of the type, times a little for sums.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def random(*shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().double().requires_grad_(tensor.requires_grad)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str = "") -> None:
    found, expected = found.detach().cpu().double(), expected.detach()
    assert found.shape == expected.shape, what
    if expected.numel():
        size = expected.abs().max().clamp_min(0.1)  # terms of order one may cancel
        difference = (found - expected).abs().max()
        assert difference <= TOLERANCE[dtype] * size, f"{what}: {difference / size:.2g} of the largest element"


def compare(ours, theirs, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Outputs and gradients of `ours(*inputs)` beside those of `theirs` in float64."""
    inputs = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    twins = [exact(tensor) if tensor.is_floating_point() else tensor.cpu() for tensor in inputs]
    found, expected = ours(*inputs), theirs(*twins)
    found = found if isinstance(found, tuple) else (found,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    upstream = [random(*value.shape, seed=7) for value in expected]
    for number, (value, right) in enumerate(zip(found, expected, strict=True)):
        assert_close(value, right, dtype, f"output {number}")
    sum((value.double() * up.to(value.device)).sum() for value, up in zip(found, upstream, strict=True)).backward()
    sum((value * up.double()).sum() for value, up in zip(expected, upstream, strict=True)).backward()
    for number, (ours_in, twin) in enumerate(zip(inputs, twins, strict=True)):
        if ours_in.is_floating_point():
            assert_close(ours_in.grad, twin.grad, dtype, f"gradient {number}")


ROWS = [(1, 1), (3, 5), (2, 3, 64), (5, 130), (4, 1031), (0, 8), (2, 2050)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("form", ["llama", "gemma"])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(device, dtype, shape, form, residual):
    options = {"offset": 1.0, "multiply_wide": True} if form == "gemma" else {}
    x = random(*shape, dtype=dtype, device=device)
    weight = random(shape[-1], dtype=dtype, device=device, seed=1)
    if not residual:
        compare(
            lambda x, w: kernels.rms_norm(x, w, 1e-6, **options), lambda x, w: reference.rms_norm(x, w, 1e-6, **options), [x, weight], dtype
        )
        return
    more = random(*shape, dtype=dtype, device=device, seed=2)

    def theirs(x, r, w):
        total = x + r
        return reference.rms_norm(total, w, 1e-6, **options), total

    compare(lambda x, r, w: kernels.rms_norm(x, w, 1e-6, residual=r, **options), theirs, [x, more, weight], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
def test_layer_norm(device, dtype, shape):
    x = random(*shape, dtype=dtype, device=device)
    weight, bias = (random(shape[-1], dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    if shape[-1] == 1:
        x = x.detach()  # one element is its own mean: the gradient is 0 / sqrt(eps)
    compare(lambda *a: kernels.layer_norm(*a, 1e-5), lambda *a: reference.layer_norm(*a, 1e-5), [x, weight, bias], dtype)


def test_a_large_mean_does_not_drown_the_variance(device):
    x = random(4, 300, device=device) + 1000
    weight, bias = torch.ones(300, device=device), torch.zeros(300, device=device)
    found = kernels.layer_norm(x, weight, bias)
    torch.testing.assert_close(found.cpu().double(), reference.layer_norm(x.cpu().double(), None, None, 1e-5), rtol=1e-3, atol=1e-3)


GATES = {
    "swiglu": (kernels.swiglu, reference.swiglu),
    "geglu tanh": (kernels.geglu, reference.geglu),
    "geglu exact": (lambda g, u: kernels.geglu(g, u, tanh=False), lambda g, u: reference.geglu(g, u, tanh=False)),
}


FUSED = {
    "swiglu": (kernels.swiglu, swiglu_gradients),
    "geglu tanh": (kernels.geglu, geglu_gradients),
    "geglu exact": (partial(kernels.geglu, tanh=False), partial(geglu_gradients, tanh=False)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUSED)
def test_gradients_of_gates_with_the_result_again(device, dtype, name):
    dy, gate, up = (random(3, 1031, dtype=dtype, device=device, seed=seed, scale=3) for seed in range(3))
    both, y = FUSED[name][1](dy, gate, up)
    leaves = [one.cpu().double().requires_grad_(True) for one in (gate, up)]
    expected = GATES[name][1](*leaves)
    slopes = torch.cat(torch.autograd.grad(expected, leaves, dy.cpu().double()), dim=1)
    assert_close(y, expected, dtype, "result")
    assert_close(both, slopes, dtype, "gradients")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 64), (3, 1031), (0, 8)])
@pytest.mark.parametrize("name", GATES)
def test_gates(device, dtype, shape, name):
    gate, up = (random(*shape, dtype=dtype, device=device, seed=seed, scale=3) for seed in (0, 1))
    compare(*GATES[name], [gate, up], dtype)


@pytest.mark.parametrize("name", GATES)
def test_gates_of_huge_inputs_stay_finite(device, name):
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=device, requires_grad=True)
    y = GATES[name][0](gate, torch.ones_like(gate))
    y.sum().backward()
    assert y.isfinite().all() and gate.grad.isfinite().all()
    torch.testing.assert_close(y.detach().cpu(), torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]))


def test_halves_of_one_tensor(device):
    """Fused gate_up projections give views with a row stride of 2 N."""
    both = random(6, 2 * 40, device=device).requires_grad_(True)
    gate, up = both.chunk(2, dim=-1)
    assert not gate.is_contiguous()
    y = kernels.swiglu(gate, up)
    torch.testing.assert_close(y, reference.swiglu(gate, up))
    y.square().sum().backward()
    found, both.grad = both.grad, None
    reference.swiglu(*both.chunk(2, dim=-1)).square().sum().backward()
    torch.testing.assert_close(found, both.grad, rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_lie_in_order(device):
    x = random(5, 3, 48, device=device).transpose(0, 1)
    weight = random(48, device=device, seed=1)
    torch.testing.assert_close(kernels.rms_norm(x, weight), reference.rms_norm(x, weight, 1e-6), rtol=1e-5, atol=1e-5)
    columns = random(48, 7, device=device).T
    torch.testing.assert_close(kernels.rms_norm(columns, weight), reference.rms_norm(columns, weight, 1e-6), rtol=1e-5, atol=1e-5)


def test_a_gradient_whose_rows_lie_apart(device):
    """As a gated MLP gives it, beside what its adapters get."""
    x, weight = random(6, 32, device=device).requires_grad_(True), random(32, device=device, seed=1)
    wide = random(6, 40, device=device, seed=2)
    found, expected = (torch.autograd.grad(kernels.rms_norm(x, weight), x, dy)[0] for dy in (wide[:, :32], wide[:, :32].contiguous()))
    assert torch.equal(found, expected)


def angles(*shape, dtype=torch.float32, device="cpu", seed=0):
    """cos and sin whose halves are alike."""
    half = random(*shape[:-1], shape[-1] // 2, seed=seed) * 3
    return tuple(f(torch.cat((half, half), -1)).to(device, dtype) for f in (torch.cos, torch.sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "H", "K", "T", "D", "R"),
    [(1, 1, 1, 1, 2, 2), (2, 4, 2, 5, 16, 16), (2, 3, 1, 7, 80, 80), (1, 28, 4, 3, 128, 128), (2, 4, 4, 3, 64, 32), (1, 2, 2, 0, 8, 8)],
)
@pytest.mark.parametrize("shared", [False, True])
def test_rope(device, dtype, B, H, K, T, D, R, shared):
    q, k = random(B, H, T, D, dtype=dtype, device=device), random(B, K, T, D, dtype=dtype, device=device, seed=1)
    cos, sin = angles(1 if shared else B, T, R, device=device)
    wide = [cos.double().cpu(), sin.double().cpu()]
    compare(lambda q, k: kernels.rope(q, k, cos, sin), lambda q, k: reference.rope(q, k, *wide), [q, k], dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_mrope(device, interleaved):
    q, k = random(2, 4, 5, 16, device=device), random(2, 2, 5, 16, device=device, seed=1)
    cos, sin = angles(3, 2, 5, 16, device=device)
    sections = [4, 2, 2]

    def theirs(q, k):
        picked = [reference.mrope_angles(values.double().cpu(), sections, interleaved=interleaved) for values in (cos, sin)]
        return reference.rope(q, k, *picked)

    compare(lambda q, k: kernels.mrope(q, k, cos, sin, sections, interleaved=interleaved), theirs, [q, k], torch.float32)


def test_mrope_picks_the_axes_of_transformers():
    """Qwen2-VL splits by sections; Qwen3-VL interleaves t h w and leaves the rest to t."""
    assert reference.axis_of_pairs([2, 3, 3], False) == [0, 0, 1, 1, 1, 2, 2, 2]
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    sections = [24, 20, 20]

    class Rotary(torch.nn.Module):
        mrope_section = sections
        recomposed = Qwen3VLTextRotaryEmbedding.recomposition_frequencies

    merged = Rotary().recomposed(torch.arange(3.0).view(3, 1, 1, 1).repeat(1, 1, 1, 64))
    assert merged.flatten().tolist() == [float(axis) for axis in reference.axis_of_pairs(sections, True)] * 2


def test_rope_keeps_the_layout_of_a_projection(device):
    """q as it comes from a linear layer: [B, T, H, D] transposed; neither copied before nor after."""
    q, k = (random(2, 6, heads, 16, device=device, seed=heads).transpose(1, 2) for heads in (4, 2))
    cos, sin = angles(2, 6, 16, device=device)
    found = kernels.rope(q, k, cos, sin)
    for ours, theirs in zip(found, reference.rope(q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    if INTERPRETED or device == "cuda":
        assert found[0].stride() == q.stride()


def quantised(*shape, dtype=torch.float32, device="cpu", nested=True, seed=0):
    from bitsandbytes import functional

    return functional.quantize_4bit(random(*shape, dtype=dtype, device=device, seed=seed), compress_statistics=nested, quant_type="nf4")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (3, 128), (70, 64), (257, 320), (5, 7), (9, 33)])
def test_nf4_dequantize_is_bitsandbytes_to_the_bit(device, dtype, nested, shape):
    from bitsandbytes import functional

    codes, state = quantised(*shape, dtype=dtype, device=device, nested=nested)
    expected = functional.dequantize_4bit(codes, state)
    found = kernels.nf4_dequantize(codes, state)
    assert found.dtype == dtype
    if INTERPRETED and dtype == torch.bfloat16:  # Triton 3.7.1's interpreter cuts off where a GPU rounds
        assert torch.equal(kernels.nf4_dequantize(codes, state, torch.float32).to(dtype), expected)
        return
    assert torch.equal(found, expected)
    for storage in (torch.float32, torch.bfloat16):  # as ZeRO-3 wants it: packed bytes in a float type
        if codes.numel() % storage.itemsize == 0:
            assert torch.equal(kernels.nf4_dequantize(codes.flatten().view(storage), state), expected)


@pytest.mark.parametrize("shape", [(1, 64), (70, 64), (130, 192), (9, 33), (257, 96)])
def test_nf4_dequantize_into_rows_that_lie_apart(device, shape):
    """Also where a block of 64 weights reaches into the next row; what lies between the rows is left."""
    codes, state = quantised(*shape, device=device)
    for missing in (0, 4, 32):
        wide = torch.full((shape[0] + 1, shape[1] + missing), 7.0, device=device)
        out = kernels.nf4_dequantize(codes, state, out=wide[: shape[0], : shape[1]])
        assert torch.equal(out, kernels.nf4_dequantize(codes, state)) and out.data_ptr() == wide.data_ptr()
        assert (wide[:, shape[1] :] == 7).all() and (wide[shape[0]] == 7).all()


LAYERS = [(1, 64, 64, 4), (7, 128, 70, 3), (16, 192, 130, 8), (33, 64, 96, 4), (0, 64, 32, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "K", "N", "r"), LAYERS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_nf4_lora_linear(device, dtype, M, K, N, r, with_bias):
    codes, state = quantised(N, K, dtype=dtype, device=device)
    W = kernels.nf4_dequantize(codes, state).cpu().double()
    inputs = [random(M, K, dtype=dtype, device=device), random(r, K, device=device, seed=1), random(N, r, device=device, seed=2)]
    inputs += [random(N, device=device, seed=3)] if with_bias else []

    def ours(x, A, B, bias=None):
        return kernels.nf4_lora_linear(x, codes, state, bias, adapters=((A, B, 0.5),))

    def theirs(x, A, B, bias=0.0):
        return x @ W.T + bias + 0.5 * (x @ A.T) @ B.T

    compare(ours, theirs, inputs, dtype)


def group_of(widths, K, r, device, dtype, *, bias=True, scales=(0.5, 0.5, 0.5)):
    """Layers with their weights, biases and factors in float64 beside them."""
    made = [quantised(N, K, dtype=dtype, device=device) for N in widths]
    factors = [random(r, K, device=device, seed=number) for number in range(len(widths))]
    factors += [random(N, r, device=device, seed=9 + number) for number, N in enumerate(widths)]
    biases = [random(N, dtype=dtype, device=device, seed=20 + number) if bias else None for number, N in enumerate(widths)]

    def layers(factors):
        count = len(widths)
        pairs = zip(factors[:count], factors[count:], strict=True)
        return [Layer(*pair, bias, A, B, s) for pair, bias, (A, B), s in zip(made, biases, pairs, scales, strict=False)]

    whole = [kernels.nf4_dequantize(*pair).cpu().double() for pair in made]
    return layers, factors, whole, [0.0 if one is None else one.cpu().double() for one in biases]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [(0.5, 0.5, 0.5), (0.5, 2.0, 1.0)])
@pytest.mark.parametrize("widths", [(96,), (96, 64, 70)])
def test_nf4_lora_group(device, dtype, widths, scales):
    layers, factors, whole, biases = group_of(widths, 64, 4, device, dtype, scales=scales)
    copies, count = Copies(), len(widths)

    def ours(x, *factors):
        return torch.cat(nf4_lora_group(x, layers(factors), copies), dim=-1)

    def theirs(x, *factors):
        parts = zip(whole, biases, factors[:count], factors[count:], scales, strict=False)
        return torch.cat([x @ W.T + b + s * (x @ A.T) @ B.T for W, b, A, B, s in parts], dim=-1)

    compare(ours, theirs, [random(3, 7, 64, dtype=dtype, device=device), *factors], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize(("bias", "width"), [(True, 128), (False, 128), (True, 92), (False, 99)])
def test_nf4_gated_mlp(device, dtype, name, bias, width):
    """A width that is no multiple of 8 is filled up inside."""
    up, of_up, up_whole, up_bias = group_of((width, width), 64, 4, device, dtype, bias=bias)
    down, of_down, down_whole, down_bias = group_of((64,), width, 3, device, dtype, bias=bias)
    gate, gradients = FUSED[name]
    copies = Copies()

    def ours(x, A, A2, B, B2, A3, B3):
        return nf4_gated_mlp(x, [*up([A, A2, B, B2]), *down([A3, B3])], (gate, gradients), copies)

    def theirs(x, A, A2, B, B2, A3, B3):
        halves = [x @ W.T + b + 0.5 * (x @ a.T) @ c.T for W, b, a, c in zip(up_whole, up_bias, (A, A2), (B, B2), strict=True)]
        y = GATES[name][1](*halves)
        return y @ down_whole[0].T + down_bias[0] + 0.5 * (y @ A3.T) @ B3.T

    compare(ours, theirs, [random(18, 64, dtype=dtype, device=device), *of_up, *of_down], dtype)


def test_together_drops_what_each_alone_drops(device):
    """The same seeds, drawn in the same order, give the same masks, and so the same numbers; in the backward pass too."""
    layers, factors, _, _ = group_of((64, 96), 64, 4, device, torch.float32)
    down, of_down, _, _ = group_of((64,), 96, 4, device, torch.float32)
    leaves = [factor.requires_grad_(True) for factor in [*factors, *of_down]]
    x = random(20, 64, device=device).requires_grad_(True)
    one_by_one = partial(_one_by_one, dropout=0.3)
    ours = nf4_lora_group(x, make := layers(factors), Copies(), dropout=0.3)
    torch.manual_seed(5)
    found = torch.autograd.grad(sum(y.square().sum() for y in nf4_lora_group(x, make, Copies(), dropout=0.3)), [x, *leaves[:4]])
    torch.manual_seed(5)
    expected = torch.autograd.grad(sum(one_by_one(x, layer).square().sum() for layer in make), [x, *leaves[:4]])
    for one, other in zip(found, expected, strict=True):
        assert_close(one, exact(other), torch.float32)
    assert not torch.equal(ours[0], nf4_lora_group(x, make, Copies())[0])
    mlp, of_mlp, _, _ = group_of((96, 96), 64, 4, device, torch.float32)
    leaves = [factor.requires_grad_(True) for factor in [*of_mlp, *of_down]]
    three = [*mlp(of_mlp), *down(of_down)]
    torch.manual_seed(5)
    z = nf4_gated_mlp(x, three, FUSED["swiglu"], Copies(), dropout=0.3)
    torch.manual_seed(5)
    halves = [one_by_one(x, layer) for layer in three[:2]]
    other = one_by_one(kernels.swiglu(*halves), three[2])
    assert_close(z, exact(other), torch.float32)
    for one, same in zip(*(torch.autograd.grad(y.square().sum(), [x, *leaves]) for y in (z, other)), strict=True):
        assert_close(one, exact(same), torch.float32)


def _one_by_one(x, layer, dropout):
    adapter = (layer.A, layer.B, layer.scale)
    return kernels.nf4_lora_linear(x, layer.codes, layer.state, layer.bias, adapters=(adapter,), dropout=dropout)


def test_a_norm_is_made_again(device):
    """Of a norm's output only its input is kept, and the gradients are the same."""
    layers, factors, _, _ = group_of((96, 64), 64, 4, device, torch.float32)
    x, weight = random(20, 64, device=device).requires_grad_(True), random(64, device=device, seed=3)
    leaves = [x, *(factor.requires_grad_(True) for factor in factors)]

    def gradients(forgets: bool):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = kernels.rms_norm(x, weight)
            y = y.clone() if forgets else y
            loss = sum(one.square().sum() for one in nf4_lora_group(y, layers(factors), Copies()))
        kept = {t.untyped_storage().data_ptr() for t in saved}
        return torch.autograd.grad(loss, leaves), y.untyped_storage().data_ptr() in kept

    found, kept = gradients(False)
    expected, kept_whole = gradients(True)
    assert kept_whole and (kept is not (INTERPRETED or device == "cuda"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_groups_that_do_not_fit_are_refused():
    layers, factors, _, _ = group_of((96, 64), 64, 4, "cpu", torch.float32)
    with pytest.raises(ValueError, match="nf4_lora_group: adapters and weights"):
        nf4_lora_group(random(3, 32), layers(factors), Copies())
    with pytest.raises(ValueError, match="nf4_gated_mlp"):
        nf4_gated_mlp(random(3, 64), [*layers(factors), layers(factors)[0]], FUSED["swiglu"], Copies())


def test_rows_that_are_known(device):
    hidden, weight = random(9, 16, device=device).requires_grad_(True), random(21, 16, device=device, seed=1)
    labels = torch.tensor([3, -100, 5, -100, -100, 20, 0, -100, 7], device=device)
    rows = (labels >= 0).nonzero().squeeze(1)
    losses = [kernels.linear_cross_entropy(hidden, weight, labels, rows=known)[0] for known in (None, rows)]
    assert torch.equal(*losses) and torch.equal(*(torch.autograd.grad(loss, hidden)[0] for loss in losses))


def test_nf4_linear_with_no_adapter_and_with_two(device):
    codes, state = quantised(48, 64, device=device)
    W = kernels.nf4_dequantize(codes, state).cpu().double()
    x = random(2, 3, 64, device=device)
    compare(lambda x: kernels.nf4_lora_linear(x, codes, state), lambda x: x @ W.T, [x.clone()], torch.float32)
    pairs = [random(*shape, device=device, seed=seed) for seed, shape in enumerate(((4, 64), (48, 4), (2, 64), (48, 2)))]
    compare(
        lambda x, a, b, c, d: kernels.nf4_lora_linear(x, codes, state, adapters=((a, b, 0.5), (c, d, 2.0))),
        lambda x, a, b, c, d: x @ W.T + 0.5 * x @ a.T @ b.T + 2 * x @ c.T @ d.T,
        [x, *pairs],
        torch.float32,
    )


def test_dropout_is_the_same_in_both_passes(device):
    """With A = I and B = I the output shows the mask, and the gradient must carry the same one; its share of zeros is p."""
    codes, state = quantised(256, 256, device=device)
    W = kernels.nf4_dequantize(codes, state)
    x = torch.ones(40, 256, device=device, requires_grad=True)
    A, B = (torch.eye(256, device=device, requires_grad=True) for _ in range(2))
    torch.manual_seed(3)
    y = kernels.nf4_lora_linear(x, codes, state, adapters=((A, B, 1.0),), dropout=0.25)
    mask = (y - x @ W.T).detach()
    kept = mask > 0.5
    assert 0.2 < 1 - kept.float().mean() < 0.3
    torch.testing.assert_close(mask, kept.float() / 0.75, rtol=1e-3, atol=1e-3)
    upstream = random(40, 256, device=device)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ W + upstream * kept / 0.75, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(A.grad, upstream.T @ (kept / 0.75), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(B.grad, upstream.T @ (kept / 0.75), rtol=1e-3, atol=2e-3)
    torch.manual_seed(3)
    again = kernels.nf4_lora_linear(x, codes, state, adapters=((A, B, 1.0),), dropout=0.25)
    assert torch.equal(again, y)


def test_nothing_large_is_saved():
    """x itself, the packed weight, A, B and h: no dequantised weight, no copy of x."""
    codes, state = quantised(256, 256)
    x, A, B = random(32, 256).requires_grad_(True), random(4, 256).requires_grad_(True), random(256, 4).requires_grad_(True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernels.nf4_lora_linear(x, codes, state, adapters=((A, B, 1.0),), dropout=0.5)
    known = {t.untyped_storage().data_ptr() for t in (x, codes, A, B)}
    others = [t for t in saved if t.untyped_storage().data_ptr() not in known]
    assert sum(t.numel() for t in others) <= 32 * 4


GROUPS = [
    ([1], 1, 1),
    ([5, 0, 17, 1], 5, 7),
    ([0, 70, 0], 130, 64),  # all rows of one group, more than a tile
    ([16, 16, 16, 16], 32, 48),
    ([0, 0, 33, 3, 0, 20, 0], 3, 150),
    ([40, 41], 70, 4),
    ([0, 0], 8, 6),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "N", "K"), GROUPS)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_linear(device, dtype, rows, N, K, transposed):
    x = random(sum(rows), K, dtype=dtype, device=device)
    weight = random(len(rows), *((K, N) if transposed else (N, K)), dtype=dtype, device=device, seed=1)
    counts = torch.tensor(rows, device=device)

    def theirs(x, weight):
        whole = weight if transposed else weight.transpose(1, 2)
        return torch.einsum("sk,skn->sn", x, whole[torch.repeat_interleave(counts.cpu())])

    compare(lambda x, weight: kernels.grouped_linear(x, weight, counts, transposed=transposed), theirs, [x, weight], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_outer_of_parts_of_wider_rows(device, dtype):
    wide = random(60, 150, dtype=dtype, device=device)
    left, right, counts = wide[:, :70], wide[:, 70:].T.contiguous().T, torch.tensor([0, 37, 1, 22], device=device)
    assert left.stride() == (150, 1) and right.stride(0) == 1
    groups = zip(exact(left).split(counts.tolist()), exact(right).split(counts.tolist()), strict=True)
    expected = torch.stack([ours.T @ others for ours, others in groups])
    assert not expected[0].any() and not kernels.grouped_outer(left, right, counts)[0].any()
    assert_close(kernels.grouped_outer(left, right, counts), expected, dtype)


@pytest.mark.parametrize("which", [0, 1])
def test_grouped_linear_keeps_only_what_the_gradients_that_are_asked_for_need(device, which):
    counts = torch.tensor([3, 4], device=device)
    inputs, saved = [random(7, 16, device=device), random(2, 8, 16, device=device, seed=1)], []
    inputs[which].requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = kernels.grouped_linear(*inputs, counts)
    y.sum().backward()
    assert inputs[which].grad.any() and inputs[1 - which].grad is None
    if INTERPRETED or device == "cuda":
        assert inputs[which].shape not in saved and inputs[1 - which].shape in saved


HEADS = [(1, 8, 5), (6, 16, 40), (37, 24, 515), (4, 8, 4100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D", "V"), HEADS)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"label_smoothing": 0.1, "z_loss": 1e-2}, {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}],
    ids=["plain", "softcap", "smoothing and z", "all"],
)  # fmt: skip
def test_linear_cross_entropy(device, dtype, N, D, V, options):
    generator = torch.Generator().manual_seed(N)
    labels = torch.randint(V, (N,), generator=generator)
    labels[1::3] = -100
    hidden, weight = random(N, D, dtype=dtype, device=device), random(V, D, dtype=dtype, device=device, seed=1, scale=0.3)
    bias = random(V, dtype=dtype, device=device, seed=2)
    compare(
        lambda h, w, b: kernels.linear_cross_entropy(h, w, labels.to(h.device), bias=b, **options)[0],
        lambda h, w, b: reference.linear_cross_entropy(h, w, labels, bias=b, **options)[0],
        [hidden, weight, bias],
        dtype,
    )
    assert int(kernels.linear_cross_entropy(hidden, weight, labels.to(device))[1]) == int((labels != -100).sum())


def test_a_frozen_head_gets_no_gradient_and_chunks_change_nothing(device, monkeypatch):
    module = importlib.import_module("vlm_kernels.linear_cross_entropy")
    hidden, weight = random(70, 16, device=device).requires_grad_(True), random(99, 16, device=device, seed=1)
    labels = torch.arange(70, device=device) % 99
    found = []
    for size in (1 << 20, 1):
        monkeypatch.setitem(module.CHUNK_BYTES, torch.device(device).type, size)
        loss, _ = kernels.linear_cross_entropy(hidden, weight, labels)
        hidden.grad = None
        loss.backward()
        found.append((loss.detach(), hidden.grad))
    assert weight.grad is None
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_no_label_at_all(device):
    hidden, weight = random(5, 8, device=device).requires_grad_(True), random(9, 8, device=device, seed=1).requires_grad_(True)
    loss, count = kernels.linear_cross_entropy(hidden, weight, torch.full((5,), -100, device=device))
    loss.backward()
    assert loss == 0 and count == 0 and not hidden.grad.any() and not weight.grad.any()


def test_autocast_decides_the_dtype(device):
    """As for torch's own linear layer: float32 weights compute in bfloat16, gradients come back in the weights' dtype."""
    labels = torch.tensor([1, 2, 0, 4], device=device)
    hidden, weight = random(4, 8, device=device).requires_grad_(True), random(9, 8, device=device, seed=1).requires_grad_(True)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        loss, _ = kernels.linear_cross_entropy(hidden, weight, labels)
    expected, _ = kernels.linear_cross_entropy(hidden.detach().bfloat16(), weight.detach().bfloat16(), labels)
    loss.backward()
    assert torch.equal(loss, expected) and hidden.grad.dtype == weight.grad.dtype == torch.float32 and weight.grad.any()


def test_large_and_infinite_logits(device):
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0, 2.0], [2.0, 1.0], [-1.0, 3.0]], device=device)
    bias = torch.tensor([0.0, 0.0, -float("inf")], device=device)  # a token that is never allowed
    labels = torch.tensor([0, 1], device=device)
    loss, _ = kernels.linear_cross_entropy(hidden, weight, labels, bias=bias)
    loss.backward()
    twin = hidden.detach().cpu().double().requires_grad_(True)
    expected, _ = reference.linear_cross_entropy(twin, weight.cpu().double(), labels.cpu(), bias=bias.cpu().double())
    torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert hidden.grad.isfinite().all()


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="the PyTorch path has no index arithmetic of ours")
def test_rows_beyond_2_to_the_31_elements():
    """The third row lies 2^31 + 16 elements behind the first: its number times the stride fits no 32-bit integer. On a CPU the memory
    between is never touched."""
    numpy = pytest.importorskip("numpy")
    stride = 2**30 + 8
    size = 2 * stride + 64
    far = torch.from_numpy(numpy.zeros(size, dtype=numpy.float16)) if INTERPRETED else torch.zeros(size, dtype=torch.float16).cuda()
    x = far.as_strided((3, 64), (stride, 1))
    x.copy_(random(3, 64))
    near = x.clone()
    weight, bias = random(64, dtype=torch.float16, seed=1).to(x.device), random(64, dtype=torch.float16, seed=2).to(x.device)
    assert torch.equal(kernels.rms_norm(x, weight), kernels.rms_norm(near, weight))
    assert torch.equal(kernels.layer_norm(x, weight, bias), kernels.layer_norm(near, weight, bias))
    assert torch.equal(kernels.swiglu(x, near), kernels.swiglu(near, near))
    assert torch.equal(kernels.geglu(x, near), kernels.geglu(near, near))
    q = far.as_strided((3, 1, 1, 64), (stride, 64, 64, 1))
    cos, sin = angles(3, 1, 64, device=x.device)
    k = near.view(3, 1, 1, 64)
    for ours, theirs in zip(kernels.rope(q, k, cos, sin), kernels.rope(k, k, cos, sin), strict=True):
        assert torch.equal(ours, theirs)
    codes, state = quantised(16, 64, dtype=torch.float16, device=str(x.device))
    assert torch.equal(kernels.nf4_lora_linear(x, codes, state), kernels.nf4_lora_linear(near, codes, state))
    counts, weights = torch.tensor([1, 0, 2], device=x.device), random(3, 8, 64, dtype=torch.float16, seed=3).to(x.device)
    assert torch.equal(kernels.grouped_linear(x, weights, counts), kernels.grouped_linear(near, weights, counts))
    assert torch.equal(kernels.grouped_outer(x, x, counts), kernels.grouped_outer(near, near, counts))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: kernels.rms_norm(torch.ones(2, 4), torch.ones(3)), "last dimension of x is 4"),
        (lambda: kernels.rms_norm(torch.ones(2, 4), torch.ones(4), residual=torch.ones(4)), "shapes differ"),
        (lambda: kernels.layer_norm(torch.ones(2, 4), torch.ones(4), torch.ones(3)), "rows of 4 elements"),
        (lambda: kernels.swiglu(torch.ones(2, 4), torch.ones(2, 5)), "shapes differ"),
        (lambda: kernels.rope(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), torch.ones(1, 4, 8), torch.ones(1, 4, 8)), "expected"),
        (lambda: kernels.mrope(*[torch.ones(1, 2, 3, 8)] * 2, *[torch.ones(3, 1, 3, 8)] * 2, [1, 1, 1]), "the sum of sections"),
        (lambda: kernels.linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 4), torch.ones(2)), "expected"),
        (lambda: kernels.grouped_linear(torch.ones(2, 3), torch.ones(2, 5, 4), torch.tensor([1, 1])), r"must fit weights of \(2, 5, 4\)"),
        (lambda: kernels.grouped_linear(torch.ones(2, 4), torch.ones(2, 5, 4), torch.tensor([2])), r"counts \(1,\) must fit"),
        (lambda: kernels.grouped_linear(torch.ones(2, 4), torch.ones(2, 5, 4).half(), torch.tensor([1, 1])), "weights are torch.float16"),
        (lambda: kernels.grouped_outer(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([1, 1])), "must be as many rows of one dtype"),
    ],
)
def test_what_does_not_fit_is_refused(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()


def test_an_op_where_something_looks_on_and_a_function_where_nothing_does(device):
    """A mode sees the op; without one torch's dispatcher is not asked. Values and gradients are the same."""
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    weight, labels = random(21, 16, device=device, seed=1), torch.arange(9, device=device)

    def gradient():
        hidden = random(9, 16, device=device).requires_grad_(True)
        loss = kernels.linear_cross_entropy(hidden, weight, labels)[0]
        loss.backward()
        return loss.detach(), hidden.grad

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        found = gradient()
    assert not any("vlm_kernels" in event.key for event in profiled.key_averages())
    with Watching():
        watched = gradient()
    assert "vlm_kernels.linear_cross_entropy.default" in seen
    for one, other in zip(found, watched, strict=True):
        assert torch.equal(one, other)


def test_ops_are_what_torch_library_expects(device):
    """Schema, fake implementation and autograd registration agree: torch.compile and checkpointing then see ordinary ops. On a CPU
    only linear_cross_entropy is an op; the others' are looked at where the kernels run."""
    ops = torch.ops.vlm_kernels
    x, weight, bias = (random(*shape, device=device, seed=seed) for seed, shape in enumerate(((4, 16), (16,), (16,))))
    labels = torch.arange(4, device=device)
    cases = [(ops.linear_cross_entropy, (x, random(9, 16, device=device), None, labels, 0.0, 0.0, 0.0, True, True, None))]
    cases.append((ops.linear_cross_entropy, (*cases[0][1][:-1], torch.arange(4, device=device))))
    if INTERPRETED or device == "cuda":
        q, k = random(1, 2, 3, 8, device=device), random(1, 1, 3, 8, device=device)
        angle = random(1, 1, 3, 8, device=device)
        axis = torch.zeros(4, dtype=torch.int32, device=device)
        cases += [
            (ops.rms_norm, (x, None, weight, 1e-6, 0.0, False)),
            (ops.rms_norm, (x, x.clone(), weight, 1e-6, 1.0, True)),
            (ops.layer_norm, (x, weight, bias, 1e-5)),
            (ops.swiglu, (x, x.clone())),
            (ops.geglu, (x, x.clone(), True)),
            (ops.swiglu_gradients, (x.clone(), x, x.clone())),
            (ops.geglu_gradients, (x.clone(), x, x.clone(), False)),
            (ops.rope, (q, k, angle, angle.clone(), axis, False)),
            (ops.grouped_linear, (x, random(2, 8, 16, device=device).requires_grad_(), torch.tensor([1, 3], device=device), False)),
            (ops.grouped_outer, (x, x.clone(), torch.tensor([1, 3], device=device))),
        ]
    for op, arguments in cases:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
