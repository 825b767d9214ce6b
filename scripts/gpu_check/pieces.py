"""Pieces of a step beside what else computes them: scripts/bench/kernels.py in short, the patch embedding as Conv3d and as a product,
decoding beside bitsandbytes, and attention over packed samples by lengths and by a mask."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from part import Part, last_line, median_ms, run


def bench(part: Part) -> None:
    """Ours must not be slower than PyTorch's; decoding not slower than bitsandbytes'."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "kernels.json"
        options = ["--dry-run"] if part.dry else ["--rounds", "10", "--tokens", "4096", "--no-compile"]
        result = run(sys.executable, "scripts/bench/kernels.py", *options, "--out", str(out), timeout=120)
        if result.returncode:
            return part.find("wrong", "scripts/bench/kernels.py", last_line(result))
        rows = json.loads(out.read_text())
    part.results["kernels"] = rows
    for row in rows["results"]:
        others = {name: value["ms"] for name, value in row.items() if isinstance(value, dict) and name != "ours"}
        best = min(others, key=lambda name: others[name])
        found = f"{row['ours']['ms']:.3f} ms, {best} {others[best]:.3f}"
        good = part.dry or row["ours"]["ms"] <= 1.05 * others[best]
        part.judge(good, f"{row['kernel']} {row['shape']}"[:44], found, "slow")
    return None


def patch_embedding(part: Part) -> None:
    """Stride = kernel, so the convolution is one product: the same numbers, and one of them 10 to 20 times slower in torch 2.9."""
    patches, width = (16, 32) if part.dry else (4096, 1280)
    kind = torch.float32 if part.dry else torch.bfloat16
    conv = torch.nn.Conv3d(3, width, (2, 14, 14), (2, 14, 14), bias=False).to(part.device, kind)
    x = torch.randn(patches, 3 * 2 * 14 * 14, device=part.device, dtype=kind)
    weight = conv.weight.view(width, -1)

    def convolution() -> torch.Tensor:
        return conv(x.view(-1, 3, 2, 14, 14)).view(-1, width)

    def product() -> torch.Tensor:
        return torch.nn.functional.linear(x, weight)

    with torch.no_grad():
        apart = (convolution().float() - product().float()).norm() / product().float().norm()
        times = {name: median_ms(call, part.device, 10) for name, call in (("conv3d", convolution), ("product", product))}
    part.results["patch_embedding"] = {**times, "apart": float(apart)}
    part.judge(float(apart) < 1e-2, "patch embedding as a product", f"{times['product']:.3f} ms, as Conv3d {times['conv3d']:.3f} ms")


def packed_attention(part: Part) -> None:
    """Four samples in a row: a dense mask, or lengths (torch.nn.attention.varlen, where this torch has it)."""
    tokens, heads, width = (32, 2, 16) if part.dry else (4096, 28, 128)
    kind = torch.float32 if part.dry else torch.bfloat16
    q, k, v = (torch.randn(1, heads, tokens, width, device=part.device, dtype=kind) for _ in range(3))
    sample = torch.arange(4, device=part.device).repeat_interleave(tokens // 4)
    mask = (sample[:, None] == sample[None]) & torch.ones(tokens, tokens, device=part.device).tril().bool()

    def masked() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None])

    times: dict[str, Any] = {"mask": median_ms(masked, part.device, 10)}
    part.results["packed_attention"] = times
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return part.find("skipped", "packed attention by lengths", f"torch {torch.__version__} has no varlen_attn")
    if part.dry:
        return part.find("skipped", "packed attention by lengths", f"needs a card; by a mask {times['mask']:.3f} ms")
    starts = torch.arange(0, tokens + 1, tokens // 4, device=part.device, dtype=torch.int32)
    flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v)]

    def by_lengths() -> torch.Tensor:
        return varlen_attn(*flat, starts, starts, tokens // 4, tokens // 4, window_size=(-1, 0))  # causal

    apart = (by_lengths().transpose(0, 1)[None].float() - masked().float()).abs().max()
    times["lengths"] = median_ms(by_lengths, part.device, 10)
    return part.judge(float(apart) < 0.05, "packed attention by lengths", f"{times['lengths']:.3f} ms, by a mask {times['mask']:.3f} ms")


def grouped_attention(part: Part) -> None:
    """The same forward and backward, as models attend: fewer heads of keys and values, by the function that training calls."""
    from vlm_dist.models.patching_lengths import on_card, refused_by_card, sample_by_sample

    tokens, heads, groups, width = (32, 4, 2, 16) if part.dry else (4096, 28, 4, 128)
    kind = torch.float32 if part.dry else torch.bfloat16
    if not part.dry and (reason := refused_by_card(kind, width)):
        return part.find("skipped", "grouped attention by lengths", reason)
    made = {"device": part.device, "dtype": kind}
    q, k, v = (torch.randn(tokens, number, width, **made, requires_grad=True) for number in (heads, groups, groups))
    starts = torch.arange(0, tokens + 1, tokens // 4, device=part.device, dtype=torch.int32)
    sample = torch.arange(4, device=part.device).repeat_interleave(tokens // 4)
    mask, upstream = ((sample[:, None] == sample[None]).tril(), torch.randn(tokens, heads, width, **made))

    def masked() -> tuple[torch.Tensor, ...]:
        of_heads = [one.repeat_interleave(heads // one.shape[1], 1).transpose(0, 1)[None] for one in (q, k, v)]
        found = torch.nn.functional.scaled_dot_product_attention(*of_heads, attn_mask=mask[None, None])[0].transpose(0, 1)
        return found, *torch.autograd.grad(found, (q, k, v), upstream)

    def by_lengths() -> tuple[torch.Tensor, ...]:
        found = sample_by_sample(q, k, v, starts, -1, None) if part.dry else on_card(q, k, v, starts, tokens // 4, None, (-1, 0))
        return found, *torch.autograd.grad(found, (q, k, v), upstream)

    apart = max(
        float((mine - other).detach().float().norm() / other.detach().float().norm())
        for mine, other in zip(by_lengths(), masked(), strict=True)
    )
    times = {"mask": median_ms(masked, part.device, 10), "lengths": median_ms(by_lengths, part.device, 10), "apart": apart}
    part.results["grouped_attention"] = times
    return part.judge(apart < 2e-2, "grouped attention by lengths", f"{times['lengths']:.3f} ms, by a mask {times['mask']:.3f} ms")


def main() -> None:
    part = Part(__doc__)
    part.attempt("scripts/bench/kernels.py", lambda: bench(part))
    part.attempt("patch embedding", lambda: patch_embedding(part))
    part.attempt("packed attention", lambda: packed_attention(part))
    part.attempt("grouped attention", lambda: grouped_attention(part))
    part.write()


if __name__ == "__main__":
    main()
