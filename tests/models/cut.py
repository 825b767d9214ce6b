"""One rank of a group that shares its rows: losses and gradients of each case, beside those of the whole rows on one rank.

    tests/models/cut.py OUT.json float32 CHECKPOINT ...

Ranks come from the environment, as a launcher tells them. Every rank computes the same cases; rank 0 writes what it found.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from tests.videos import clip
from vlm_dist.config import ModelConfig
from vlm_dist.config_model import VideoConfig
from vlm_dist.data.collate import collate, collate_packed
from vlm_dist.data.encode import Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.data.video import open_clip
from vlm_dist.distributed import start
from vlm_dist.models.ahead import ahead_rule
from vlm_dist.models.introspect import family_of
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.patching import patch_model
from vlm_dist.models.patching_lengths import attend_by_lengths
from vlm_dist.models.positions import position_rule
from vlm_dist.models.processor import load_processor
from vlm_dist.models.sequence import SequenceCut
from vlm_dist.models.shared_pictures import share_rows

VIDEO = "<a video>"


def talk(key: str, parts: list[str | tuple[int, int]], answer: str) -> Sample:
    """Text, pictures (by their sizes) and videos in order, then an answer."""
    generator = torch.Generator().manual_seed(len(answer))
    images, clips, content = [], [], []
    for part in parts:
        if part == VIDEO:
            clips.append(open_clip(clip(frames=25, size=(60, 40)), "v.mp4", 10**6))
            content.append({"type": "video"})
            continue
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
            continue
        pixels = torch.randint(0, 255, (part[1], part[0], 3), dtype=torch.uint8, generator=generator)
        images.append(Image.fromarray(pixels.numpy()))
        content.append({"type": "image"})
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return Sample(key, "s.tar", turns, images, videos=clips)


CASES = {
    "a picture at the start": [talk("a", [(64, 64), "What colour is it?"], "red and blue")],
    "a picture at the cut": [talk("b", ["What colour is the shape of this picture?", (64, 64)], "a green cross, a circle and a square")],
    "several": [talk("c", [(40, 30), "and", (64, 64), "which one is red?"], "the second"), talk("d", [(33, 77), "?"], "yellow")],
    "none beside one": [talk("e", ["How many?"], "three of them"), talk("f", [(40, 30), "?"], "red")],
}
FILMED = [talk("g", [VIDEO, "Where does it go?"], "to the left"), talk("h", [(40, 30), "and", VIDEO, "?"], "up")]


def batches(encoder: Encoder, model, number: int) -> dict[str, dict]:
    pad = encoder.processor.tokenizer.pad_token_id
    encoded = {name: [encoder.encode(sample) for sample in samples] for name, samples in CASES.items()}
    found = {name: collate(samples, pad, multiple=number) for name, samples in encoded.items()}
    found["a padded row"] = collate(encoded["several"], pad, multiple=(13 * number if number > 1 else 1))
    if encoder.videos.name:
        found["videos"] = collate([encoder.encode(sample) for sample in FILMED], pad, multiple=number)
    flat = [sample for samples in encoded.values() for sample in samples]
    found["packed"] = collate_packed([flat[:3], flat[3:]], pad, position_rule(model), 13 * number if number > 1 else 1)
    return {name: {key: one.to(model.dtype) if one.is_floating_point() else one for key, one in b.items()} for name, b in found.items()}


def gradients(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = summed_loss(model, batch)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pictures_seen(model) -> list[int]:
    """How many pictures, or patches of pictures, each call of the vision tower gets."""
    seen: list[int] = []

    def note(_, given: tuple, named: dict) -> None:
        seen.append(len(named["pixel_values"] if "pixel_values" in named else given[0]))

    model.get_submodule(family_of(model).vision).register_forward_pre_hook(note, with_kwargs=True)
    return seen


def compared(checkpoint: str, ranks, dtype: torch.dtype) -> dict[str, dict]:
    """Case -> the loss in parts and whole, and the largest difference of a gradient, relative to the largest gradient."""
    from transformers import AutoModelForImageTextToText

    number = ranks.world_size
    encoder = Encoder(load_processor(ModelConfig(name=checkpoint), checkpoint), 4096, video=VideoConfig(max_frames=4, min_frames=2))
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa").train()
    cut = SequenceCut(number, ranks.rank, dist.group.WORLD)
    rows = {}
    for kernels, recomputed in (("off", False), ("auto", True)):
        model = copy.deepcopy(whole)
        if recomputed:  # by lengths where the family can; the other half has masks
            attend_by_lengths(model, family_of(model), "varlen", packs=True, on_gpu=False, dtype=dtype)
        shared, seen = not share_rows(model, family_of(model), cut), pictures_seen(model)
        rule = ahead_rule(model) if recomputed else dict
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        patch_model(model, kernels)
        plain_batches = batches(encoder, whole, 1)
        for name, batch in batches(encoder, model, number).items():
            plain = plain_batches[name]
            expected_loss, expected = gradients(whole, plain)
            seen.clear()
            with cut.cutting():
                loss, found = gradients(model, rule(batch))
            computed = sum(seen)
            largest = max(float(one.abs().max()) for one in expected.values())
            worst, which = 0.0, ""
            for parameter, one in model.named_parameters():
                mine = found.get(parameter)
                mine = torch.zeros_like(one) if mine is None else mine
                dist.all_reduce(mine)
                other = expected.get(parameter)
                error = float((mine - (torch.zeros_like(one) if other is None else other)).abs().max()) / largest
                worst, which = max((worst, which), (error, parameter))
            length, tokens = plain["input_ids"].shape[1], batch["input_ids"].shape[1]
            rows[f"{name}, kernels {kernels}"] = {
                "loss": ranks.sum(loss), "expected": expected_loss, "worst": worst, "which": which, "padded": tokens - length,
                "again": summed_loss(model, plain).item(), "shared": shared, "mine": computed, "pictures": sum(seen[len(seen) // 2 :]),
            }  # fmt: skip
    return rows


def main() -> None:
    out, dtype, *checkpoints = sys.argv[1:]
    ranks = start()
    rows = {Path(checkpoint).name: compared(checkpoint, ranks, getattr(torch, dtype)) for checkpoint in checkpoints}
    if ranks.is_first:
        Path(out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
