"""The loss: summed over supervised tokens, so that the caller divides by their global number once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

IGNORED = -100  # as in torch.nn.functional.cross_entropy

OURS = (
    "labels", "datasets", "num_datasets", "weights", "supervised_rows", "picture_tokens", "sample_starts", "longest_sample",
    "picture_keys", "known_features", "known_field", "known_places", "missing_places",
)  # fmt: skip
"""What the model does not take."""
WEIGHT_UNIT = 1_000_000  # of `weights`, as vlm_dist.data.encode writes them

if TYPE_CHECKING:
    import torch


def summed_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the next token, summed over the batch's supervised tokens, in float32: a scalar, or of a mixture of D data sets
    the sum of each, [D].

    Only positions that predict a supervised token somewhere in the batch go through the output head; in a model with the kernel
    linear_cross_entropy only the supervised rows themselves, and their logits never exist as a whole.

    Of a model whose rows are cut over ranks (models/sequence.py) the sum over this rank's part.

    Args:
        model: takes the batch without `labels`, and `loss_labels`, or `logits_to_keep` as a 1-D tensor of positions.
        batch: `input_ids`, `labels` [B, T] and whatever else the model takes; of a mixture `datasets` [B, T], the data set that each
            token comes from, and `num_datasets`, a scalar; where turns have weights `weights` [B, T], (w - 1) x 10^6; what was worked
            out ahead (models/ahead.py).
    """
    places, lengths, features = (getattr(model, name, None) for name in ("picture_places", "sample_lengths", "tower_features"))
    with (
        nullcontext() if places is None else places.counted(batch.get("picture_tokens")),
        nullcontext() if lengths is None else lengths.of(batch),
        nullcontext() if features is None else features.of(batch),
    ):
        return _summed(model, batch)


def _summed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    import torch

    labels_BT = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name not in OURS}
    if getattr(model, "gives_summed_loss", False):
        if "weights" in batch:
            return _by_weight(model, inputs, batch)
        rows = {"supervised_rows": batch["supervised_rows"]} if "supervised_rows" in batch else {}
        return model(**inputs, loss_labels=_split(labels_BT, batch), **rows, use_cache=False).loss
    next_BT = _next(labels_BT, model, IGNORED)
    positions_P = (next_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    if len(positions_P) == 0:  # a blank row: any position will do, none counts
        positions_P = torch.zeros(1, dtype=torch.long, device=labels_BT.device)
    logits_BPV = model(**inputs, logits_to_keep=positions_P, use_cache=False).logits
    if logits_BPV.shape[1] != len(positions_P):  # Gemma 4 keeps all of a row that is cut over ranks
        logits_BPV = logits_BPV[:, positions_P]
    targets_BP = next_BT[:, positions_P]
    losses_N = torch.nn.functional.cross_entropy(
        logits_BPV.flatten(0, 1).float(), targets_BP.flatten(), ignore_index=IGNORED, reduction="none"
    )
    if "weights" in batch:
        losses_N = losses_N * (1 + _next(batch["weights"], model, 0)[:, positions_P].flatten() / WEIGHT_UNIT)
    if "datasets" not in batch:
        return losses_N.sum()
    from_N = _next(batch["datasets"], model, 0)[:, positions_P].flatten()
    return losses_N.new_zeros(int(batch["num_datasets"])).index_add(0, from_N, losses_N)


def _next(of_tokens_BT: torch.Tensor, model: Any, last: int) -> torch.Tensor:
    """What belongs to the token after each, of the part of the row that the model computes here (models/sequence.py)."""
    import torch

    shifted_BT = torch.nn.functional.pad(of_tokens_BT[:, 1:], (0, 1), value=last)
    cut = getattr(model, "sequence_cut", None)
    return shifted_BT if cut is None else cut.of(shifted_BT, 1)


def _by_weight(model: Any, inputs: dict[str, Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same of a model that sums by itself: the labels of each weight apart, in one call."""
    import torch

    split = _split(batch["labels"], batch).view(-1, *batch["labels"].shape)
    units = batch["weights"][batch["labels"] != IGNORED].unique().tolist() or [0]
    apart = torch.stack([labels.where(batch["weights"] == unit, IGNORED) for labels in split for unit in units])
    losses = model(**inputs, loss_labels=apart, use_cache=False).loss.view(len(split), len(units))
    weighted = losses @ losses.new_tensor([1 + unit / WEIGHT_UNIT for unit in units])
    return weighted if "datasets" in batch else weighted[0]


def _split(labels_BT: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a mixture [D, B, T]: the labels of one data set each."""
    import torch

    if "datasets" not in batch:
        return labels_BT
    return torch.stack([labels_BT.where(batch["datasets"] == number, IGNORED) for number in range(int(batch["num_datasets"]))])
