"""The loss and its one denominator."""

from __future__ import annotations

import pytest
import torch

from vlm_dist.config import OptimConfig
from vlm_dist.families import FAMILIES
from vlm_dist.models.loss import WEIGHT_UNIT, summed_loss
from vlm_dist.training.optim import build_optimizer, learning_rate


class Model(torch.nn.Module):
    """Embedding and head: logits of a token depend on that token alone."""

    def __init__(self, vocabulary=11, width=6):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.head = torch.nn.Linear(width, vocabulary)

    def forward(self, input_ids, logits_to_keep, use_cache, attention_mask=None):
        assert use_cache is False  # packed rows need it
        hidden = self.embedding(input_ids)[:, logits_to_keep]
        return type("Output", (), {"logits": self.head(hidden)})


def batch(rows=3, tokens=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[torch.rand(ids.shape, generator=generator) < 0.6] = -100
    return {"input_ids": ids, "labels": labels}


def test_equals_the_plain_sum_and_its_gradient():
    torch.manual_seed(0)
    model, data = Model(), batch()
    ours = summed_loss(model, data)
    everything = model(data["input_ids"], torch.arange(7), False).logits[:, :-1]
    plain = torch.nn.functional.cross_entropy(everything.flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(ours, plain)
    ours_grad = torch.autograd.grad(ours, model.head.weight)[0]
    torch.testing.assert_close(ours_grad, torch.autograd.grad(plain, model.head.weight)[0])


def test_a_single_supervised_token():
    model, data = Model(), batch(rows=1)
    data["labels"][:] = -100
    data["labels"][0, 4] = data["input_ids"][0, 4]
    expected = -model(data["input_ids"], torch.tensor([3]), False).logits.log_softmax(-1)[0, 0, data["input_ids"][0, 4]]
    torch.testing.assert_close(summed_loss(model, data), expected)


def test_a_model_that_sums_its_loss_is_asked_for_it():
    class Summing(Model):
        gives_summed_loss = True

        def forward(self, input_ids, loss_labels, use_cache):
            assert use_cache is False
            return type("Output", (), {"loss": loss_labels.clamp(min=0).sum((-1, -2))})

    data = batch()
    assert summed_loss(Summing(), data) == data["labels"].clamp(min=0).sum()
    sources = torch.tensor([[0] * 7, [1] * 7, [1] * 7])
    parts = summed_loss(Summing(), {**data, "datasets": sources, "num_datasets": torch.tensor(2)})
    assert parts.tolist() == [float(data["labels"][rows].clamp(min=0).sum()) for rows in ([0], [1, 2])]


def test_nothing_supervised_is_zero_with_a_graph():
    model, data = Model(), batch()
    data["labels"][:] = -100
    loss = summed_loss(model, data)
    loss.backward()
    assert loss.item() == 0 and model.head.weight.grad.abs().sum() == 0


def test_of_a_mixture_each_data_set_has_its_own():
    model, data = Model(), batch()
    sources = torch.tensor([[0] * 7, [2] * 7, [0, 0, 0, 0, 2, 2, 2]])  # the last row is packed; nothing is of the data set 1
    parts = summed_loss(model, {**data, "datasets": sources, "num_datasets": torch.tensor(3)})
    whole = summed_loss(model, data)
    assert parts.shape == (3,) and parts[1] == 0
    torch.testing.assert_close(parts.sum(), whole)
    only = {**data, "labels": data["labels"].where(sources == 2, -100)}
    torch.testing.assert_close(parts[2], summed_loss(model, only))


@pytest.mark.parametrize(("schedule", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_learning_rate(schedule, middle, end):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 110) for step in range(110)]
    assert rates[0] == pytest.approx(1 / 11) and rates[9] == pytest.approx(10 / 11) and rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(middle) and rates[109] == pytest.approx(end, abs=0.02)
    assert max(rates) <= 1.0
    share = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=0.5)
    assert learning_rate(share, 49, 100) < 1.0 and learning_rate(share, 50, 100) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_optimizer_steps_and_spares_vectors_from_decay(name):
    model = Model(width=64, vocabulary=128)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.5), FAMILIES["llava"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    before = model.head.bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight = model.head.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.head.bias.detach(), before)
    torch.testing.assert_close(model.head.weight.detach(), weight * (1 - 0.1 * 0.5))


def test_turns_count_by_their_weight():
    """The sum over the tokens, each times its weight; of a mixture for each data set; the same where the model sums by itself."""
    torch.manual_seed(0)
    model, data = Model(), batch()
    weights = torch.tensor([[1.0] * 7, [0.25] * 7, [1.0, 1.0, 1.0, 2.5, 2.5, 2.5, 2.5]])
    data["weights"] = ((weights - 1) * WEIGHT_UNIT).long()
    logits = model(data["input_ids"], torch.arange(7), False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), data["labels"][:, 1:], ignore_index=-100, reduction="none")
    by_row = (losses * weights[:, 1:]).sum(1)
    torch.testing.assert_close(summed_loss(model, data), by_row.sum())
    mixture = {**data, "datasets": torch.tensor([[0] * 7, [1] * 7, [1] * 7]), "num_datasets": torch.tensor(2)}
    torch.testing.assert_close(summed_loss(model, mixture), torch.stack([by_row[0], by_row[1:].sum()]))

    class Summing(Model):
        gives_summed_loss = True

        def forward(self, input_ids, loss_labels, use_cache):
            flat = loss_labels.view(-1, *input_ids.shape)
            each = [
                torch.nn.functional.cross_entropy(logits.transpose(1, 2), one[:, 1:], ignore_index=-100, reduction="sum") for one in flat
            ]
            return type("Output", (), {"loss": torch.stack(each)})

    torch.testing.assert_close(summed_loss(Summing(), data), by_row.sum())
    torch.testing.assert_close(summed_loss(Summing(), mixture), torch.stack([by_row[0], by_row[1:].sum()]))
