"""Attention by the lengths of samples instead of a mask of whole rows: packed samples, and what pads a row, are blocks of their own.

A mask [B, 1, T, T] keeps attention from the fused kernels of a GPU, repeats keys and values for each query head, and is compared with
positions on the device. Here the model's layers are handed where samples begin in the flattened [B T] (int32, worked out on the CPU by
models/ahead.py), as a 4-D "mask", which transformers passes on as it is. On a card torch's varlen_attn reads it; on a CPU, and where a
test compares, one sample after another goes through scaled_dot_product_attention.

Shapes: B rows, T tokens of a row, N blocks, H heads, K heads of keys and values, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any

import torch

from vlm_dist.families import Family
from vlm_dist.models.patching_loss import is_counted
from vlm_dist.upstream.transformers import attend_by, attention_configs, attention_interface, register_attention

VARLEN = "varlen"
WIDEST = 256  # numbers a head that flash-attention takes
AMPERE = (8, 0)


class SampleLengths:
    """Of the micro-batch that is computed: where its samples begin, and how long the longest is."""

    def __init__(self) -> None:
        self.now: tuple[torch.Tensor, int] | None = None

    def __deepcopy__(self, memo: Any) -> SampleLengths:
        return self  # the decoder's hook has this one

    @contextmanager
    def of(self, batch: dict[str, Any]) -> Iterator[None]:
        """Inside, layers attend by what the batch brings along; one that brings nothing gets masks."""
        self.now = (batch["sample_starts"], batch["longest_sample"]) if "sample_starts" in batch else None
        try:
            yield
        finally:
            self.now = None

    def hand_over(self, _: Any, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before a decoder's forward, whose arguments these are."""
        if self.now is None:
            return given, named
        starts, longest = self.now
        return given, named | {"attention_mask": starts.view(1, 1, 1, -1), "max_length_q": longest}


def attend_by_lengths(model: Any, family: Family, wanted: str, *, packs: bool, on_gpu: bool, dtype: torch.dtype) -> str:
    """Let a model's language side attend by lengths, where `model.attn_implementation` asks for it (varlen), or leaves it open (auto)
    and packed rows are computed on a GPU. The model may be adapted by PEFT; call it before rows are cut and kernels put in.

    Args:
        packs: rows hold several samples.
        on_gpu: it will compute on one, or is counted for one.
        dtype: of its computation.

    Returns:
        What was chosen, in words; nothing where nothing was asked.
    """
    if wanted != VARLEN and not (wanted == "auto" and packs and on_gpu):
        return ""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    reason = needs_masks(base, family, on_gpu, dtype)
    if reason:
        return f"attention: masks, not the lengths of samples ({reason})"
    register_attention(VARLEN, attend, like="sdpa")
    for config in attention_configs(base):
        attend_by(config, VARLEN)
    base.sample_lengths = lengths = SampleLengths()
    base.get_decoder().register_forward_pre_hook(lengths.hand_over, with_kwargs=True)
    return "attention: by the lengths of samples, without masks"


def needs_masks(base: Any, family: Family, on_gpu: bool, dtype: torch.dtype) -> str:
    """Why a model's attention cannot be computed by lengths alone; empty: it can."""
    text = base.config.get_text_config()
    if not family.packs:
        return f"rows of '{family.model_type}' cannot be split into samples"
    if family.two_way:
        return f"the tokens of a picture of '{family.model_type}' see one another both ways"
    if getattr(text, "attn_logit_softcapping", None):
        return f"'{family.model_type}' caps its scores at {text.attn_logit_softcapping}"
    if getattr(text, "attention_dropout", 0.0):
        return f"attention_dropout={text.attention_dropout}"
    return _needed_on_card(base, dtype) if on_gpu else ""


def _needed_on_card(base: Any, dtype: torch.dtype) -> str:
    attention, text = base.get_decoder().layers[0].self_attn, base.config.get_text_config()
    width, heads = attention.head_dim, text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    return cannot_on_card(dtype, heads, keys, width)


def cannot_on_card(dtype: torch.dtype, heads: int, keys: int, width: int) -> str:
    """Why `on_card` is not for these heads on the card that is here, or, where none is, on any; empty: it can be."""
    return refused_by_card(dtype, width) or (disagrees_on_card(dtype, heads, keys, width) if torch.cuda.is_available() else "")


@cache
def disagrees_on_card(dtype: torch.dtype, heads: int, keys: int, width: int) -> str:
    """What a small input, computed by varlen_attn and sample by sample, shows of this card; empty: the same values and gradients."""
    try:
        # asked in the middle of a model, too: a layer that is computed again counts what is saved, and an evaluation has no gradients
        with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            both = [_values_and_gradients(attention, dtype, heads, keys, width) for attention in (_by_lengths, _by_samples)]
    except RuntimeError as error:
        return f"varlen_attn does not run here: {str(error).splitlines()[0][:120]}"
    for one, other in zip(*both, strict=True):
        if not (one - other).abs().max() <= 0.03 * other.abs().max():
            return "varlen_attn gives other numbers here than attention sample by sample"
    return ""


def _values_and_gradients(attention: Callable, dtype: torch.dtype, heads: int, keys: int, width: int) -> list[torch.Tensor]:
    numbers = torch.arange(20 * heads * width, device="cuda")
    leaves = [(numbers[: 20 * n * width] * (i + 1)).sin().view(20, n, width).to(dtype) for i, n in enumerate((heads, keys, keys))]
    found = attention(*(leaf.requires_grad_() for leaf in leaves), torch.tensor([0, 7, 20], dtype=torch.int32, device="cuda"))
    return [found.detach(), *torch.autograd.grad(found.square().sum(), leaves)]


def _by_lengths(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    return on_card(query, key, value, starts, 13, None, (-1, 0))


def _by_samples(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    return sample_by_sample(query, key, value, starts, -1, None)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@cache
def refused_by_card(dtype: torch.dtype, width: int) -> str:
    """Why varlen_attn cannot be used on a card for heads of `width` numbers; empty: it can."""
    if not {"scale", "window_size"} <= _options():
        return f"torch {torch.__version__} has no varlen_attn for them"
    if dtype == torch.float32:
        return "flash-attention takes no float32"
    if width % 8 or width > WIDEST:
        return f"flash-attention takes no heads of {width} numbers"
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else AMPERE
    if found < AMPERE:
        return f"compute capability {found[0]}.{found[1]}, flash-attention needs 8.0"
    return ""


@cache
def _options() -> frozenset[str]:
    """What this torch's varlen_attn can be told; nothing where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(signature(varlen_attn).parameters)


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, *,
    scaling: float | None = None, sliding_window: int | None = None, max_length_q: int = 0, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface: query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D].

    Args:
        attention_mask: where samples begin in [B T], and B T: int32, [1, 1, 1, N + 1]; or a mask (evaluation, generation).
        sliding_window: so many tokens of its own sample a token sees, itself among them.
        max_length_q: the longest sample.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return attention_interface("sdpa")(module, query, key, value, attention_mask, scaling=scaling, **options)
    flat = [one.to(value.dtype).transpose(1, 2).flatten(0, 1) for one in (query, key, value)]
    before = -1 if sliding_window is None else sliding_window - 1
    if computes_on_card(query):
        found = on_card(*flat, attention_mask.view(-1), max_length_q, scaling, (before, 0))
    else:
        found = sample_by_sample(*flat, attention_mask.view(-1), before, scaling)
    return found.unflatten(0, (query.shape[0], query.shape[2])), None


def computes_on_card(tensor: torch.Tensor) -> bool:
    """Whether it lies on a card, or is counted for one."""
    return tensor.is_cuda or is_counted(tensor)


def on_card(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int, scale: float | None,
    window: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    """query [M, H, D], key and value [M, K, D] in 16 bit -> [M, H, D]: attention inside each block of M tokens, which begin at `starts`
    [N + 1] (int32, there) and are at most `longest` long; a token sees so many before and behind it (-1: all)."""
    from torch.nn.attention.varlen import varlen_attn

    shared: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _options():
            shared["enable_gqa"] = True
        else:
            key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    found: Any = varlen_attn(query, key, value, starts, starts, longest, longest, scale=scale, window_size=window, **shared)
    return found


def sample_by_sample(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, before: int, scale: float | None
) -> torch.Tensor:
    """query [M, H, D], key and value [M, K, D] -> [M, H, D]: a token sees itself and those before it in its sample, at most `before` of
    them (-1: all)."""
    found = []
    for q, k, v in zip(*(one.split(starts.diff().tolist()) for one in (query, key, value)), strict=True):
        window = None if before < 0 or len(q) <= before + 1 else q.new_ones(len(q), len(q), dtype=torch.bool).tril().triu(-before)
        attended = torch.nn.functional.scaled_dot_product_attention(
            *(one.transpose(0, 1)[None] for one in (q, k, v)), attn_mask=window, is_causal=window is None, scale=scale, enable_gqa=True
        )
        found.append(attended[0].transpose(0, 1))
    return torch.cat(found)
