"""Output head and cross-entropy in one, for vocabularies of 150,000 tokens of which few are supervised: the logits of all rows never
exist. Rows without a label are left out; the others go through in chunks, and the gradient of a chunk's logits overwrites them.

    l = h W^T + b,  l' = cap * tanh(l / cap) with a soft-cap, else l
    loss = sum over labelled rows of  lse - (1 - eps) l'[y] - eps mean(l') + z lse^2,   lse = log sum exp l'
    dl'  = softmax(l') (1 + 2 z lse) - eps / V - (1 - eps) [v = y],   dl = dl' (1 - (l' / cap)^2)
    dh   = dl W,  dW = dl^T h,  db = sum dl

    shapes    hidden [N, D], weight [V, D], bias [V], labels [N] (-100: not supervised); S rows are labelled
    saved     dh of the labelled rows [S, D] and their numbers; dW and db if they train
    bytes     a chunk of C rows: logits written once, read twice and overwritten: about 4 e C V; one chunk in memory at a time
    FLOPs     2 S V D forward, 2 S V D for dh, 2 S V D for dW if it trains; nothing for the N - S other rows
    backward  done in the forward pass; scaled by the incoming gradient
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from vlm_kernels.common import Compilation, runs_kernel, triton_type
from vlm_kernels.launch import launch
from vlm_kernels.operation import operation
from vlm_kernels.reference import IGNORED

CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 16 << 20}
"""Size of a chunk's logits."""


@triton.jit
def _softcapped(logits, softcap, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        bounded = 1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0)  # tanh
        return softcap * bounded
    return logits


@triton.jit
def _row_kernel(
    LOGITS, LABELS, LOSS, V, stride, smoothing, z_loss, softcap, HAS_CAP: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: its loss; and its logits' gradient in their place."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    label = tl.load(LABELS + row)
    # before the sums, whose barriers stand between this load of one thread and the stores of all
    right = _softcapped(tl.load(LOGITS + label).to(tl.float32), softcap, HAS_CAP)
    largest = -float("inf")
    total = 0.0
    logit_sum = 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(LOGITS + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        logits = tl.where(columns < V, _softcapped(logits, softcap, HAS_CAP), -float("inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=0))
        base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(logits - base), axis=0)
        largest = new_largest
        logit_sum += tl.sum(tl.where(columns < V, logits, 0.0), axis=0)
    lse = largest + tl.log(total)
    loss = lse - (1.0 - smoothing) * right + z_loss * lse * lse
    if smoothing > 0.0:
        loss -= smoothing / V * logit_sum
    tl.store(LOSS + row, loss)
    if WITH_GRAD:
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            logits = tl.load(LOGITS + columns, mask=columns < V, other=0.0).to(tl.float32)
            capped = _softcapped(logits, softcap, HAS_CAP)
            slope = tl.exp(capped - lse) * (1.0 + 2.0 * z_loss * lse) - smoothing / V
            slope -= tl.where(columns == label, 1.0 - smoothing, 0.0)
            if HAS_CAP:
                slope *= 1.0 - (capped / softcap) * (capped / softcap)
            tl.store(LOGITS + columns, slope.to(LOGITS.dtype.element_ty), mask=columns < V)


def _row_losses(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float, z_loss: float, softcap: float, with_grad: bool
) -> torch.Tensor:
    """Losses [C] of a chunk's logits [C, V]; their gradient overwrites them."""
    if runs_kernel(logits):
        loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        block = min(4096, triton.next_power_of_2(logits.shape[1]))
        launch(
            _row_kernel, (len(logits),),
            logits, labels, loss, logits.shape[1], logits.stride(0), smoothing, z_loss, softcap or 1.0, HAS_CAP=softcap > 0,
            WITH_GRAD=with_grad, BLOCK=block, num_warps=8,
        )  # fmt: skip
        return loss
    capped = torch.tanh(logits.float() / softcap).mul_(softcap) if softcap else logits.float()
    lse = capped.logsumexp(-1)
    place = labels.unsqueeze(1)
    loss = lse - (1 - smoothing) * capped.gather(1, place).squeeze(1) + z_loss * lse.square()
    if smoothing:
        loss -= smoothing * capped.mean(-1)
    if with_grad:
        bend = 1 - (capped / softcap).square() if softcap else None
        slope = capped.sub_(lse.unsqueeze(1)).exp_()
        if z_loss:
            slope *= (1 + 2 * z_loss * lse).unsqueeze(1)
        if smoothing:
            slope -= smoothing / logits.shape[1]
        slope.scatter_add_(1, place, torch.full_like(lse, smoothing - 1).unsqueeze(1))
        if bend is not None:
            slope *= bend
        if slope.data_ptr() != logits.data_ptr():  # in float32 without a soft-cap they are one
            logits.copy_(slope)
    return loss


def _chunk_rows(weight: torch.Tensor, kind: str) -> int:
    return max(16, CHUNK_BYTES[kind] // max(1, len(weight) * weight.element_size()))


def workspace_bytes(rows: int, weight: torch.Tensor, kind: str = "cuda") -> int:
    """What so many supervised rows need for a moment: a chunk's hidden states and logits, and the weight's gradient if it trains."""
    chunk = min(rows, _chunk_rows(weight, kind)) * sum(weight.shape) * weight.element_size()
    return chunk + (4 * weight.numel() if weight.requires_grad else 0)


@operation("linear_cross_entropy")
def _linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, smoothing: float, z_loss: float,
    softcap: float, with_grad: bool, with_dw: bool, known: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(loss, rows, dh of the rows, dW, db); what is not asked for has no element."""
    rows = (labels != IGNORED).nonzero().squeeze(1) if known is None else known.clone()
    S, V = len(rows), len(weight)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    dh = hidden.new_empty((S if with_grad else 0, hidden.shape[1]))
    dw = torch.zeros(weight.shape if with_dw else (0,), dtype=torch.float32, device=hidden.device)
    db = torch.zeros(V if with_dw and bias is not None else 0, dtype=torch.float32, device=hidden.device)
    chunk = _chunk_rows(weight, hidden.device.type)
    for start in range(0, S, chunk):
        part = rows[start : start + chunk]
        h = hidden[part]
        logits = torch.nn.functional.linear(h, weight, bias)
        loss += _row_losses(logits, labels[part], smoothing, z_loss, softcap, with_grad or with_dw).sum()
        if with_grad:
            torch.mm(logits, weight, out=dh[start : start + chunk])
        if with_dw:
            dw += logits.T @ h
            if bias is not None:
                db += logits.float().sum(0)
    return loss, rows, dh, dw.to(weight.dtype), db.to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(hidden, weight, bias, labels, smoothing, z_loss, softcap, with_grad, with_dw, known):
    count = torch.library.get_ctx().new_dynamic_size() if known is None else len(known)
    dh = hidden.new_empty((count if with_grad else 0, hidden.shape[1]))
    dw = weight.new_empty(weight.shape if with_dw else (0,))
    db = weight.new_empty(len(weight) if with_dw and bias is not None else 0)
    return hidden.new_empty((), dtype=torch.float32), labels.new_empty(count), dh, dw, db


def _setup(ctx, inputs, output):
    hidden, _, bias, *_ = inputs
    _, rows, dh, dw, db = output
    ctx.num_rows, ctx.has_bias = len(hidden), bias is not None
    ctx.mark_non_differentiable(rows, dh, dw, db)
    ctx.save_for_backward(rows, dh, dw, db)


def _backward(ctx, grad, *_):
    rows, dh, dw, db = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    full = None
    if needs_hidden:
        full = dh.new_zeros((ctx.num_rows, dh.shape[1])).index_copy(0, rows, dh * grad.to(dh.dtype))
    return (
        full, dw * grad.to(dw.dtype) if needs_weight else None, db * grad.to(db.dtype) if ctx.has_bias and needs_bias else None,
        None, None, None, None, None, None, None,
    )  # fmt: skip


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup)


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, bias: torch.Tensor | None = None, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float = 0.0, rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Sum of the cross-entropy of `hidden @ weight.T` over the rows that have a label, and how many these are.

    Args:
        hidden: [N, D].
        weight: [V, D]; its gradient is computed only if it requires one.
        labels: [N] int64 below V, already shifted; -100: not supervised.
        bias: [V].
        label_smoothing: share of the target spread over the vocabulary (Szegedy et al. 2016, arXiv:1512.00567).
        z_loss: weight of logsumexp^2 (PaLM, arXiv:2204.02311).
        softcap: logits are bounded by softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118); 0: not.
        rows: [S] int64, the rows that have a label, where they are known: else a GPU is waited for to know how many they are.

    All is computed in the dtype of `hidden`, under autocast in autocast's, as torch's own linear layer would be.

    Returns:
        (loss, count): float32 scalar, int64 scalar. Without any label both are 0, and so is the gradient.

    Raises:
        ValueError: shapes do not fit.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}; "
            "expected [N, D], [V, D], [N]"
        )
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    grad = torch.is_grad_enabled()
    with_dw = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    with torch.autocast(kind, enabled=False):
        loss, *_ = _linear_cross_entropy(
            hidden, weight, bias, labels, label_smoothing, z_loss, softcap, grad and hidden.requires_grad, with_dw, rows
        )
    return loss, (labels != IGNORED).sum()


def compilations() -> Iterator[Compilation]:
    """Loss alone and with the gradient, with and without a soft-cap, at the vocabularies of real models."""
    for vocabulary in (32_000, 128_256, 151_936, 262_144):
        for softcap, with_grad in ((False, True), (True, True), (False, False)):
            pointers = {"LOGITS": triton_type(torch.bfloat16), "LABELS": "*i64", "LOSS": "*fp32", "V": "i32", "stride": "i32",
                        "smoothing": "fp32", "z_loss": "fp32", "softcap": "fp32"}  # fmt: skip
            constants = {"HAS_CAP": softcap, "WITH_GRAD": with_grad, "BLOCK": min(4096, triton.next_power_of_2(vocabulary))}
            yield Compilation(_row_kernel, f"vocabulary {vocabulary}", pointers, constants, 8)
