"""The loss from hidden states: the output head and cross-entropy in one kernel, on supervised rows only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

import vlm_kernels
from vlm_dist.models.generate import autocast
from vlm_dist.models.patches import Patches, bind
from vlm_kernels import reference
from vlm_kernels.common import as_on_gpu, is_counted
from vlm_kernels.linear_cross_entropy import workspace_bytes

__all__ = ["SummedLoss", "as_on_gpu", "is_counted", "patch_linear_cross_entropy", "patch_supervised_rows", "workspace_bytes"]

LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


@dataclass
class SummedLoss(ModelOutput):
    """What a patched model returns for `loss_labels`."""

    loss: torch.Tensor | None = None


def patch_linear_cross_entropy(model: Any, patches: Patches) -> None:
    head = model.get_output_embeddings()
    head = getattr(head, "modules_to_save", {"default": head})["default"]
    text = model.config.get_text_config()
    scaled = [name for name in LOGIT_SCALES if getattr(text, name, None) not in (None, 1.0)]
    if type(head) is not torch.nn.Linear or scaled or model.base_model is model:
        patches.kept["linear_cross_entropy"] = (
            f"the output head is a {type(head).__name__}" if not scaled else f"logits are scaled by {scaled[0]}"
        )
        return
    softcap = float(getattr(text, "final_logit_softcapping", None) or 0.0)
    if not _head_is_plain(model, softcap):
        patches.kept["linear_cross_entropy"] = "the model does more between hidden states and logits than its head and a soft-cap"
        return
    patches.put("linear_cross_entropy", head, "forward", bind(head, _head_forward, softcap=softcap))
    patches.put("linear_cross_entropy", model, "forward", bind(model, _loss_forward, original=model.forward))
    patches.put("linear_cross_entropy", model, "gives_summed_loss", True)
    patches.counts["linear_cross_entropy"] = 1


def _head_is_plain(model: Any, softcap: float) -> bool:
    if model.device.type == "meta":  # no numbers to compare
        return True
    ids = torch.tensor([[5, 6]], device=model.device)
    was_training = {part: part.training for part in model.modules()}
    model.eval()
    with torch.no_grad(), autocast(model):  # a head that trains whole may be in float32 beside a bfloat16 base
        expected = model(input_ids=ids, use_cache=False).logits
        logits = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    for part, training in was_training.items():
        part.training = training
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return torch.allclose(logits.float(), expected.float(), rtol=1e-2, atol=1e-2)


def _head_forward(
    module: Any, input: torch.Tensor, labels: torch.Tensor | None = None, rows: torch.Tensor | None = None, *, softcap: float
) -> torch.Tensor:
    """The head itself computes the loss where labels are given, so that ZeRO-3 gathers its weight around this call."""
    if labels is None:
        return torch.nn.functional.linear(input, module.weight, module.bias)
    return vlm_kernels.linear_cross_entropy(input, module.weight, labels, bias=module.bias, softcap=softcap, rows=rows)[0]


def _loss_forward(
    model: Any, *arguments: Any, loss_labels: torch.Tensor | None = None, supervised_rows: torch.Tensor | None = None, original: Callable,
    **options: Any,
) -> Any:  # fmt: skip
    """The model's own forward; with `loss_labels` [B, T] the summed loss of the next token instead of logits, with [D, B, T] D of them.
    `supervised_rows` [P]: where the labels of any of them are, if that is known."""
    rows = vars(model).get("supervised_rows")
    if loss_labels is None:
        if rows is not None:
            rows.choose(None)
        return original(*arguments, **options)
    labels, cut = torch.nn.functional.pad(loss_labels[..., 1:], (0, 1), value=reference.IGNORED), vars(model).get("sequence_cut")
    if cut is not None and cut.is_on:
        labels, supervised_rows = cut.of(labels, -1), None
    labels = labels.flatten(-2)
    if rows is not None:
        of_any = (labels != reference.IGNORED).view(-1, labels.shape[-1]).any(0) if supervised_rows is None else None
        rows.choose(supervised_rows if of_any is None else of_any.nonzero().squeeze(1), labels.shape[-1])
    hidden, head = model.base_model(*arguments, **options).last_hidden_state.flatten(0, 1), model.get_output_embeddings()
    if labels.ndim == 1:
        return SummedLoss(loss=head(hidden, labels=labels, rows=supervised_rows))
    return SummedLoss(loss=torch.stack([head(hidden, labels=one) for one in labels]))


class _Rows:
    """The rows of a batch that the last decoder layer computes in full: the others' keys and values are all that anyone reads."""

    def __init__(self, layer: Any):
        self.layer = layer
        self.chosen: torch.Tensor | None = None
        self.total = 0

    def choose(self, rows: torch.Tensor | None, total: int = 0) -> None:
        """These of so many rows; None: all."""
        self.chosen, self.total = rows, total
        self.layer.gradient_checkpointing = False  # it would be recomputed at once; and then other rows may be chosen

    def apply(self, forward: Callable, x: torch.Tensor) -> torch.Tensor:
        """`forward` on the chosen rows of x [B, T, ...]; zero elsewhere."""
        if self.chosen is None or x.ndim != 3 or x.shape[0] * x.shape[1] != self.total or len(self.chosen) == 0:
            return forward(x)
        y = forward(x.flatten(0, 1)[self.chosen].unsqueeze(0)).squeeze(0)  # as one row of tokens: experts want three dimensions
        full = y.new_zeros((self.total, y.shape[-1]))
        return full.index_copy(0, self.chosen, y).view(*x.shape[:2], -1)


def patch_supervised_rows(model: Any, patches: Patches) -> None:
    """Only the rows with a label go through the last layer's query and output projections and MLP: exact, because nothing else reads
    the others."""
    layers = getattr(model.get_decoder(), "layers", None)
    layer = layers[-1] if layers else None
    parts = [_module(layer, path) for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp")]
    if not vars(model).get("gives_summed_loss") or None in parts or getattr(layer, "hidden_size_per_layer_input", 0):
        patches.kept["supervised_rows"] = "needs linear_cross_entropy and a last layer with q_proj, o_proj and mlp"
        return
    if len(inspect.signature(parts[-1].forward).parameters) > 1:  # ERNIE-4.5-VL's wants to know which tokens are a picture's
        patches.kept["supervised_rows"] = f"{type(parts[-1]).__name__} takes more than the rows"
        return
    rows = _Rows(layer)
    patches.put("supervised_rows", model, "supervised_rows", rows)
    if (together := vars(parts[0]).get("reads_with")) is not None:  # keys and values are of all rows
        patches.put("supervised_rows", parts[0], "reads_with", together.without(parts[0]))
    for part in parts:
        patches.put("supervised_rows", part, "forward", bind(part, _rows_forward, rows=rows, original=part.forward))
    patches.counts["supervised_rows"] = 1


def _rows_forward(module: Any, x: torch.Tensor, *, rows: _Rows, original: Callable) -> torch.Tensor:
    return rows.apply(original, x)


def _module(parent: Any, path: str) -> Any:
    for name in path.split("."):
        parent = getattr(parent, name, None)
    return parent
