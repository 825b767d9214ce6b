"""Experts in a merge: a layer's weight [E, X, Y] put together from whatever the base's files hold of it, merged, and cut up again.

A base holds it as the model does, with its last two dimensions exchanged, or each expert by itself (and its gate and up apart), by
transformers' own rules of loading. Adapter and rounding to NF4 are of the whole of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_dist.errors import ModelError

KEPT = 2  # wholes held at a time: files hold the two weights of a layer in turns


class ExpertParts:
    """Which keys of the base make which weight of experts."""

    def __init__(self, shapes: dict[str, torch.Size], keys: dict[str, tuple[Path, str]], rules: list[Any]):
        """
        Args:
            shapes: of the weights of experts, by the model's names.
            keys: by the base's keys the file and the model's name.
            rules: transformers' WeightConverters.
        """
        self.shapes = shapes
        self.rules = rules
        self.keys: dict[str, list[tuple[Path, str]]] = {}
        for key, (file, name) in keys.items():
            if name in shapes:
                self.keys.setdefault(name, []).append((file, key))
        self._wholes: dict[str, Tensor] = {}

    def part(self, key: str, name: str, merge: Callable[[Tensor], Tensor]) -> Tensor:
        """What stands under `key` after `merge` of the whole weight `name`."""
        if name not in self._wholes:
            while len(self._wholes) >= KEPT:
                self._wholes.pop(next(iter(self._wholes)))
            self._wholes[name] = merge(self._put_together(name))
        whole = self._wholes[name]
        file = next(file for file, other in self.keys[name] if other == key)
        return self._view(whole, key, _shape(file, key)).clone(memory_format=torch.contiguous_format)

    def _put_together(self, name: str) -> Tensor:
        """In float32."""
        from safetensors import safe_open

        whole = torch.full(self.shapes[name], torch.nan)
        for file in sorted({file for file, _ in self.keys[name]}):
            with safe_open(file, "pt") as stored:
                for key in (key for other, key in self.keys[name] if other == file):
                    tensor = stored.get_tensor(key)
                    self._view(whole, key, tensor.shape).copy_(tensor)
        if whole[:, 0, 0].isnan().any() or whole[:, -1, 0].isnan().any():
            raise ModelError(f"export: the base lacks some of the experts of '{name}'; copy or convert it again")
        return whole

    def _view(self, whole: Tensor, key: str, shape: torch.Size) -> Tensor:
        """The place of a key's tensor in the whole."""
        if whole.shape == shape:
            return whole
        if whole.transpose(1, 2).shape == shape:
            return whole.transpose(1, 2)
        for rule in self.rules:
            for share, pattern in enumerate(rule.source_patterns):
                found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)").replace(r"\^", "^").replace(r"\$", "$"), key)
                if found and found.groups():
                    view = whole[int(found[1])].chunk(len(rule.source_patterns), 0)[share]
                    if view.shape == shape:
                        return view
        raise ModelError(f"export: '{key}' is stored in another layout than the experts have ({tuple(shape)}); this base cannot be merged")


def _shape(file: Path, key: str) -> torch.Size:
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return torch.Size(stored.get_slice(key).get_shape())


def add_delta(whole: Tensor, wrapper: Any, name: str, device: torch.device) -> Tensor:
    """The whole weight with the update of each expert (PEFT's form), one expert at a time; in place."""
    for a, b, scaling in wrapper.factors().get(name.rpartition(".")[2], ()):
        experts = len(whole)
        by_a, by_b = a.detach().view(experts, -1, a.shape[-1]), b.detach().view(len(b), -1, experts)
        for number in range(experts):
            delta = (scaling * (by_b[:, :, number].float() @ by_a[number].float())).to(whole.device)
            whole[number] += delta if delta.shape == whole[number].shape else delta.T
    return whole
