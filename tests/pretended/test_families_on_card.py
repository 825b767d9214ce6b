"""A training step of every family on a card that is not there: each tensor lies where it is used, each kernel compiles as launched."""

from __future__ import annotations

import pytest
import torch

from tests.pretended.card import CARD, pretended_card
from tests.pretended.launches import pretended_launches
from tests.pretended.stepped import one_step


@pytest.fixture
def card():
    with pretended_card(), pretended_launches() as launches:
        yield launches


@pytest.mark.slow
def test_a_step(any_checkpoint, card):
    _, model = one_step(any_checkpoint, CARD, card)
    assert {tensor.device for tensor in [*model.parameters(), *model.buffers()]} == {CARD}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.device == CARD for gradient in gradients)
    wanted = {"rms_norm._forward_kernel", "nf4_dequantize._kernel"}
    wanted |= {"grouped_linear._linear_kernel", "grouped_linear._outer_kernel"} if any_checkpoint.endswith("_moe") else set()
    assert wanted <= {launch.kernel for launch in card}


@pytest.mark.slow
def test_its_loss_is_that_of_the_cpu(llava):
    with pretended_card(), pretended_launches() as card:
        found, _ = one_step(llava, CARD, card, compute=True)
    assert len({launch.kernel for launch in card}) > 8 and "linear_cross_entropy._row_kernel" in {launch.kernel for launch in card}
    expected, _ = one_step(llava, torch.device("cpu"), compute=True)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["labels", "pixel_values", "input_ids"])
def test_a_tensor_left_on_the_cpu_is_found(llava, card, name):
    with pytest.raises((RuntimeError, ValueError), match=r"on the same device|cannot be accessed from Triton"):
        one_step(llava, CARD, card, left_behind=name)


def test_a_kernel_is_not_handed_a_cpu_tensor(card):
    import vlm_kernels

    with pytest.raises((RuntimeError, ValueError), match=r"on the same device|cpu tensor"):
        vlm_kernels.rms_norm(torch.ones(2, 8, device="cuda"), torch.ones(8), 1e-6)


def test_where_things_lie(card):
    x = torch.ones(3, device="cuda", requires_grad=True)
    assert x.is_cuda and (x * 2).view(3)[1:].device == CARD and not x.cpu().is_cuda and torch.zeros_like(x).is_cuda
    assert x.to("cpu").numpy is not None and not torch.ones(3).is_cuda
    x.sum().backward()
    assert x.grad.is_cuda and x[torch.tensor([0])].is_cuda  # an index may lie on the CPU
    for wrong in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(3)]), lambda: torch.mm(x[None], torch.ones(3, 1))):
        with pytest.raises(RuntimeError, match="on the same device"):
            wrong()
    with pytest.raises(TypeError, match="can't convert cuda"):
        x.detach().numpy()
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())
