"""torch's varlen_attn on a card that is not there: what flash-attention asks of its arguments, and its numbers by plain attention."""

from __future__ import annotations

from typing import Any

import torch


def _check(query: Any, key: Any, value: Any, starts: Any, longest: int) -> None:
    for tensor in (query, key, value):
        if tensor.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if tensor.dtype != query.dtype:
            raise RuntimeError("query, key and value must have the same dtype")
        if tensor.stride(-1) != 1 or tensor.ndim != 3:
            raise RuntimeError("Input tensor must have contiguous last dimension")
        if tensor.shape[-1] % 8 or tensor.shape[-1] > 256:
            raise RuntimeError("FlashAttention forward only supports head dimension at most 256, a multiple of 8")
    if starts.dtype != torch.int32 or not starts.is_contiguous():
        raise RuntimeError("cu_seqlens_q must have dtype int32 and be contiguous")
    if int(starts[-1]) != len(query) or int(starts.diff().max()) != longest or int(starts.diff().min()) < 1:
        raise RuntimeError("cu_seqlens: reads or leaves what is not there")


def by_lengths(func: Any, args: tuple) -> Any:
    """torch_attn's own operations: (result, log-sum-exp, state of a generator), or the gradients of query, key and value. By the matrix
    of scores, in float32."""
    is_forward = func.overloadpacket.__name__ == "_varlen_attn"
    given, (starts, _, longest, _, is_causal) = (args[:3], args[3:8]) if is_forward else (args[1:4], args[6:11])
    scale, (before, after) = args[8:10] if is_forward else args[12:14]
    _check(*given, starts, longest)
    assert is_causal == ((before, after) == (-1, 0))
    heads = given[0].shape[1]
    query, key, value = (one.float().repeat_interleave(heads // one.shape[1], 1).transpose(0, 1) for one in given)  # [H, T, D]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    sample = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff().long())
    before, after = (len(sample) if side < 0 else side for side in (before, after))
    seen = (sample[:, None] == sample).tril(after).triu(-before)
    shares = (scale * query @ key.transpose(1, 2)).masked_fill(~seen, float("-inf")).softmax(-1)
    if is_forward:
        found = (shares @ value).transpose(0, 1)
        return found.to(given[0].dtype).contiguous(), found.new_zeros(heads, len(found)), torch.zeros(2, dtype=torch.uint64)
    gradient = args[0].float().transpose(0, 1)
    of_shares = gradient @ value.transpose(1, 2)
    of_scores = scale * shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True))
    made = of_scores @ key, of_scores.transpose(1, 2) @ query, shares.transpose(1, 2) @ gradient
    return tuple(
        one.unflatten(0, (like.shape[1], -1)).sum(1).transpose(0, 1).to(like.dtype).contiguous()
        for one, like in zip(made, given, strict=True)
    )
