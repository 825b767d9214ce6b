"""Which part of a model runs now, in the forward pass and in the backward pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlm_dist.families import Family
from vlm_dist.upstream.torch import tree_leaves

KINDS = (("norms", r"norm|\bln_?\d"), ("attention", r"attn|attention"), ("MLP", r"mlp|feed_forward|\bfc\d"), ("embeddings", r"embed"))
"""Of a side's modules, by their path within it."""


class Parts:
    """`now` says `vision attention`, `projector`, `language MLP`, `head, loss and rest`, ...; nothing unless a model is watched."""

    def __init__(self, family: Family):
        self._family = family
        self._running: list[str] = []

    @contextmanager
    def watching(self, model: Any | None) -> Iterator[Counter[str]]:
        """Follow this model's modules; None: none. Yields how many attention modules each side has."""
        if model is None:
            yield Counter()
            return
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        parts = {name: self._part(name) for name, _ in base.named_modules()}
        edges = [name for name, part in parts.items() if name and part != parts[name.rpartition(".")[0]]]
        hooks = [hook for name in edges for hook in self._follow(base.get_submodule(name), parts[name])]
        self._running.append(parts[""])
        try:
            yield Counter(parts[name].split()[0] for name in edges if parts[name].endswith("attention"))
        finally:
            for hook in hooks:
                hook.remove()
            self._running.clear()

    def now(self) -> str:
        """The part that runs."""
        return self._running[-1] if self._running else ""

    def _follow(self, module: Any, part: str) -> list[Any]:
        """Forward from its call to its return, backward from its results' gradients to its arguments'."""

        def begin(_: Any, args: tuple, kwargs: dict) -> None:
            if given := _with_gradients((args, kwargs)):
                torch.autograd.graph.register_multi_grad_hook(given, lambda _: self._leave(part))
            self._running.append(part)

        def end(_: Any, args: tuple, kwargs: dict, output: Any) -> None:
            self._leave(part)
            if made := _with_gradients(output):
                torch.autograd.graph.register_multi_grad_hook(made, lambda _: self._running.append(part), mode="any")

        return [module.register_forward_pre_hook(begin, with_kwargs=True), module.register_forward_hook(end, with_kwargs=True)]

    def _leave(self, part: str) -> None:
        for place in reversed(range(1, len(self._running))):
            if self._running[place] == part:
                del self._running[place]
                return

    def _part(self, path: str) -> str:
        family = self._family
        if any(_is_below(path, projector) for projector in family.projector):
            return "projector"
        for side, root in (("vision", family.vision), ("language", family.language)):
            if _is_below(path, root):
                inner = path.removeprefix(root).lower()
                return f"{side} {next((kind for kind, pattern in KINDS if re.search(pattern, inner)), 'rest')}"
        return "head, loss and rest"


def _with_gradients(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")
