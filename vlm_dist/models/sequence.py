"""One row cut over several ranks: sequence parallelism by all-to-all over heads (Ulysses, Jacobs et al. 2023, arXiv:2309.14509).

Every rank of a group has the whole micro-batch. Tokens are embedded, pictures are placed among them, masks and positions are made as for
the whole row, by the model itself; then each rank keeps its T / N tokens, and from the first layer to the loss computes with those alone.
Only inside attention a rank has all tokens, of H / N heads. Every rank's gradients are those of its tokens: their sum over the group is
the gradient of the row, the embedding's too; the vision tower's work is shared out by shared_pictures.py.

Shapes: B rows, T tokens of a row, N ranks of a group, H heads, D numbers a head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vlm_dist.upstream.transformers import attend_by, attention_configs, attention_interface, attention_of, register_attention

PREFIX = "sequence_parallel|"
"""Before the name of the attention that computes the heads of a rank."""


class SequenceCut:
    """How a model's rows are cut; put into a model it does nothing but inside `cutting()`.

    Args:
        number: N.
        part: which part of a row this rank has, from 0.
        group: the ranks that share a row; None: nothing is sent, for what runs on shapes alone.
    """

    def __init__(self, number: int, part: int, group: Any = None):
        self.number, self.part, self.group = number, part, group
        self.is_on = False
        self.sent = 0
        """Bytes that this rank has sent to others: inside attention, and features of pictures; gradients too."""

    def __deepcopy__(self, memo: Any) -> SequenceCut:
        return self  # a process group is one

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """Around forward and backward passes: layers may be computed again in the latter."""
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False

    def of(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of a tensor along its tokens; where nothing is cut, all of it."""
        if not self.is_on:
            return tensor
        length, rest = divmod(tensor.shape[dim], self.number)
        assert not rest, f"{tensor.shape[dim]} tokens over {self.number} ranks: the stream pads rows to a multiple"
        return tensor.narrow(dim, self.part * length, length).clone()  # not a view, which would keep the whole

    def exchange(self, blocks: torch.Tensor) -> torch.Tensor:
        """[N, ...]: block i goes to rank i; gives what each rank has sent here. Its gradient goes back the same way."""
        return _Exchange.apply(blocks, self)

    def exchanged(self, blocks: torch.Tensor) -> torch.Tensor:
        blocks = blocks.contiguous()
        self.sent += blocks.numel() * blocks.element_size() * (self.number - 1) // self.number
        if self.group is None:
            return blocks.clone()
        result = torch.empty_like(blocks)
        torch.distributed.all_to_all_single(result, blocks, group=self.group)
        return result

    def gathered(self, block: torch.Tensor) -> torch.Tensor:
        """[...] of each rank -> [N, ...] on all."""
        self.sent += block.numel() * block.element_size() * (self.number - 1)
        if self.group is None:
            return block.expand(self.number, *block.shape).clone()
        result = block.new_empty(self.number * len(block), *block.shape[1:])
        torch.distributed.all_gather_into_tensor(result, block.contiguous(), group=self.group)
        return result.unflatten(0, (self.number, -1))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, cut: SequenceCut) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.cut = cut
        return cut.exchanged(blocks)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.cut.exchanged(gradient), None


def cut_rows(model: Any, cut: SequenceCut) -> None:
    """Put a cut into a model, adapted by PEFT or not; call it before kernels are put in."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    base.sequence_cut = cut
    decoder.register_forward_pre_hook(lambda _, given, named: (given, _cut_deepstack(cut, named)), with_kwargs=True)
    decoder.layers[0].register_forward_pre_hook(lambda _, given: (cut.of(given[0], 1), *given[1:]))
    for name, module in decoder.named_children():
        if name.startswith("rotary_emb"):
            module.register_forward_hook(lambda _, __, turns: tuple(cut.of(one, -2) for one in turns))
    for layer in decoder.layers:
        if getattr(decoder, "hidden_size_per_layer_input", 0):  # each layer's own embedding of the tokens, [B, T, H']
            layer.register_forward_pre_hook(lambda _, given: (given[0], cut.of(given[1], 1), *given[2:]))
        layer.self_attn.sequence_cut = cut
        layer.self_attn.config_of_heads = seen = copy.copy(layer.self_attn.config)  # flash-attention reads its own name there
        attend_by(seen, _inner(attention_of(seen)))
    for config in attention_configs(base):
        attend_by(config, _registered(attention_of(config)))


def _inner(name: str) -> str:
    """The attention that computes the heads of a rank: eager is no entry of the table, each model has its own."""
    own = name.removeprefix(PREFIX)
    return "sdpa" if own in ("", "eager") else own


def _registered(name: str) -> str:
    """The name of an attention by all-to-all around another, in transformers' tables."""
    own = _inner(name)
    register_attention(PREFIX + own, _attention_over(attention_interface(own)), like=own)
    return PREFIX + own


def _attention_over(inner: Callable[..., Any]) -> Callable[..., Any]:
    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any) -> Any:
        """query [B, H, T / N, D], key and value [B, K, T / N, D] -> [B, T / N, H, D]; the mask is of the whole row."""
        cut = module.sequence_cut
        if not cut.is_on:
            return inner(_OfRank(module, query.shape[1] // key.shape[1]), query, key, value, attention_mask, **options)
        repeats = math.lcm(key.shape[1], cut.number) // key.shape[1]
        key, value = (one.repeat_interleave(repeats, 1) if repeats > 1 else one for one in (key, value))
        groups = query.shape[1] // key.shape[1]
        query, key, value = _heads_for_tokens(cut, query.to(value.dtype), key.to(value.dtype), value)
        found, weights = inner(_OfRank(module, groups), query, key, value, attention_mask, **options)
        return _tokens_for_heads(cut, found), weights

    return attend


def _heads_for_tokens(cut: SequenceCut, *of_tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each [B, H, T / N, D] -> [B, H / N, T, D]; all in one message."""
    blocks = [one.unflatten(1, (cut.number, -1)).transpose(0, 1) for one in of_tokens]  # [N, B, H / N, T / N, D]
    found = cut.exchange(torch.cat(blocks, 2)).split([block.shape[2] for block in blocks], 2)
    return tuple(one.permute(1, 2, 0, 3, 4).flatten(2, 3) for one in found)


def _tokens_for_heads(cut: SequenceCut, of_heads: torch.Tensor) -> torch.Tensor:
    """[B, T, H / N, D] -> [B, T / N, H, D]."""
    found = cut.exchange(of_heads.unflatten(1, (cut.number, -1)).transpose(0, 1))  # [N, B, T / N, H / N, D]
    return found.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _OfRank:
    """An attention module as the attention over a rank's heads is to see it."""

    def __init__(self, module: Any, groups: int):
        self.module, self.num_key_value_groups, self.config = module, groups, module.config_of_heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _cut_deepstack(cut: SequenceCut, named: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-VL adds features of pictures behind its first layers too: [P, H] of the P places that visual_pos_masks [B, T] marks."""
    places, features = named.get("visual_pos_masks"), named.get("deepstack_visual_embeds")
    if not cut.is_on or places is None or features is None:
        return named
    length = places.shape[1] // cut.number
    column = torch.arange(places.shape[1], device=places.device).expand_as(places)
    here = (column // length == cut.part)[places]
    return named | {"visual_pos_masks": cut.of(places, 1), "deepstack_visual_embeds": [one[here] for one in features]}
