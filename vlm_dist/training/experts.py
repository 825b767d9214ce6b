"""The experts of a model in training: how its tokens are shared among them, and the loss that evens this out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlm_dist.checkpoints.form import find_checkpoints
from vlm_dist.config import Config
from vlm_dist.distributed import Ranks
from vlm_dist.errors import ModelError
from vlm_dist.models.experts import balance_weight, expert_modules
from vlm_dist.models.loss import IGNORED
from vlm_dist.models.shared_pictures import gather
from vlm_dist.run_dir import RunDir, read_json
from vlm_dist.upstream.transformers import routers_with_logits

if TYPE_CHECKING:
    import torch

TINY = 1e-30  # whose logarithm is finite in float32


class ExpertWatch:
    """Counts of the tokens that each expert gets, and the logits of the routers, during forward passes; does nothing in a dense model."""

    def __init__(self, model: Any, config: Config):
        """
        Raises:
            ModelError: training.router_aux_loss is set, and the model has no router that gives its logits.
        """
        self.modules = list(expert_modules(model).values())
        self.weight = balance_weight(model, config)
        self._cut = getattr(model, "sequence_cut", None)
        self._logits: list[torch.Tensor] = []
        self._probabilities: dict[Any, bool] = {}
        self._watching = False
        self._aux = 0.0
        if not self.weight:
            return
        found = routers_with_logits(model)
        if not found:
            raise ModelError("training.router_aux_loss: this model has no router whose logits are given out; set it to 0")
        text = model.config.get_text_config()
        self.top_k = int(getattr(text, "num_experts_per_tok", None) or text.top_k_experts)
        for module, index in found:
            module.register_forward_hook(lambda router, _, output, index=index: self._heard(type(router), output[index]))

    def begin(self) -> None:
        """A step begins, or begins again."""
        self._aux = 0.0
        for module in self.modules:
            module.load = None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass; what is computed again in the backward pass lies outside."""
        for module in self.modules:
            module.watched = True
        self._logits, self._watching = [], True
        try:
            yield
        finally:
            self._watching = False
            for module in self.modules:
                module.watched = False

    def balance(self, batch: dict[str, torch.Tensor]) -> Any:
        """The load-balancing loss of the last forward pass (Fedus et al. 2021, arXiv:2101.03961, as transformers computes it), times its
        weight and the micro-batch's supervised tokens: so that it is divided by those of all ranks and micro-batches, as the loss is."""
        if not self.weight:
            return 0.0
        logits, mask, ranks = self._logits, batch.get("attention_mask"), 1
        if self._cut is not None and self._cut.is_on:  # each rank computes the loss of whole rows, and counts its share of it
            ranks = self._cut.number
            flat = [layer.flatten(0, -2) for layer in logits]  # of as many tokens on every rank
            logits = [gather(layer, [len(layer)] * ranks, self._cut) for layer in flat]
            if mask is not None and mask.ndim == 2:  # rank after rank, as the logits lie
                mask = mask.unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 1)
        aux = balance_loss(logits, self.top_k, mask)
        self._logits = []
        labels = int((batch["labels"][:, 1:] != IGNORED).sum()) / ranks
        self._aux += float(aux.detach()) * labels
        return self.weight * aux * labels

    def metrics(self, ranks: Ranks, num_labels: float) -> dict[str, Any]:
        """Of a step, over all ranks: the share of the busiest expert (mean of the layers), experts without a token, the balance loss."""
        import torch

        counts = [module.load for module in self.modules if getattr(module, "load", None) is not None]
        if not counts:
            return {}
        flat = torch.cat(counts).double().tolist()
        *summed, aux = ranks.sum_and_gather([*flat, self._aux])[0]
        for module in self.modules:
            module.load = None
        self._aux = 0.0
        layers = torch.tensor(summed).split([len(count) for count in counts])
        busiest = statistics.fmean(float(load.max() / load.sum().clamp_min(1)) for load in layers)
        row = {"busiest": round(busiest, 4), "dead": sum(number == 0 for number in summed), "of": len(summed)}
        return {"experts": row | ({"aux_loss": round(aux / num_labels, 5)} if self.weight else {})}

    def _heard(self, kind: type, logits: torch.Tensor) -> None:
        if not self._watching:
            return
        if logits.numel():
            if kind not in self._probabilities:
                self._probabilities[kind] = are_probabilities(logits.detach())
            if self._probabilities[kind]:
                logits = logits.clamp_min(TINY).log()
        self._logits.append(logits)


def as_begun(config: Config, run: RunDir, ranks: Ranks) -> Config:
    """lora.experts: auto as the newest checkpoint of the run has it, so that a run goes on with its adapters on whatever card. Every rank
    must call it."""
    if config.lora is None or config.lora.experts != "auto":
        return config
    adapter = None
    if ranks.is_first and (checkpoints := find_checkpoints(run.checkpoints)):
        adapter = read_json(checkpoints[0] / "adapter_config.json")
    adapter = ranks.gather(adapter)[0]
    if adapter is None:
        return config
    chosen = "lora" if adapter.get("target_parameters") else "off"
    return config.model_copy(update={"lora": config.lora.model_copy(update={"experts": chosen})})


def are_probabilities(given: torch.Tensor) -> bool:
    """Whether a router gives out what softmax made of its logits, [N, E], as Gemma 4's does; a softmax of these would be nearly even."""
    return bool((given >= 0).all() and ((given.sum(-1) - 1).abs() < 1e-2).all())


def balance_loss(logits: list[torch.Tensor], top_k: int, mask: torch.Tensor | None) -> torch.Tensor:
    """E times the sum over experts of the share of tokens that chose it and its mean probability; 1 x top_k where all are even.

    Args:
        logits: of each layer [N, E]; a layer that computed supervised rows alone has fewer.
        mask: [B, T], 0 at padding.
    """
    import torch

    chosen: Any = 0.0
    probability: Any = 0.0
    rows: Any = 0.0
    for layer in logits:
        weights_NE = torch.softmax(layer.flatten(0, -2).float(), -1)
        keep_N1 = weights_NE.new_ones((len(weights_NE), 1))
        if mask is not None and mask.ndim == 2 and mask.numel() == len(weights_NE):
            keep_N1 = (mask.reshape(-1, 1) != 0).to(weights_NE)
        picked_NE = torch.zeros_like(weights_NE).scatter(1, weights_NE.topk(top_k, -1).indices, 1.0)
        chosen, probability = chosen + (picked_NE * keep_N1).sum(0), probability + (weights_NE * keep_N1).sum(0)
        rows = rows + keep_N1.sum()
    return len(chosen) * (chosen / rows * probability / rows).sum()
