"""The loss: summed over supervised tokens, so that the caller divides by their global number once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_dist.data.encode import IGNORED

if TYPE_CHECKING:
    import torch


def summed_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the next token, summed over the batch's supervised tokens, in float32.

    Only positions that predict a supervised token somewhere in the batch go through the output head; in a model with the kernel
    linear_cross_entropy only the supervised rows themselves, and their logits never exist as a whole.

    Args:
        model: takes the batch without `labels`, and `loss_labels`, or `logits_to_keep` as a 1-D tensor of positions.
        batch: `input_ids`, `labels` [B, T] and whatever else the model takes.
    """
    import torch

    labels_BT = batch["labels"]
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if getattr(model, "gives_summed_loss", False):
        return model(**inputs, loss_labels=labels_BT, use_cache=False).loss
    next_BT = labels_BT[:, 1:]
    positions_P = (next_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    if len(positions_P) == 0:  # a blank row: any position will do, none counts
        positions_P = torch.zeros(1, dtype=torch.long, device=labels_BT.device)
    logits_BPV = model(**inputs, logits_to_keep=positions_P, use_cache=False).logits
    targets_BP = next_BT[:, positions_P]
    return torch.nn.functional.cross_entropy(logits_BPV.flatten(0, 1).float(), targets_BP.flatten(), ignore_index=IGNORED, reduction="sum")
