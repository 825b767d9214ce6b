"""What a training step keeps for its backward pass on one of N ranks that share each row, and what it sends them, byte by byte.

    python scripts/bench/sequence_parallel.py --out docs/benchmarks/sequence_parallel.json

One process, nothing is really sent: each part of the row is computed with tensors of the shapes that a rank has, and the part that keeps
most is told. The vision tower is frozen and keeps nothing; adapters train in the language model (hidden 256, 6 layers, 16 heads, 8 of keys
and values); every tenth token is supervised. Theory of what is sent: a rank keeps 1 / N of what it exchanges and sends the rest; it
exchanges queries, keys, values and the answer of each layer's attention, and the gradient of each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))  # there kernels.py would hide Hugging Face's package `kernels`
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench.saved_activations import batch_of, build, saved_bytes
from vlm_dist import distributed
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.data.encode import IGNORED
from vlm_dist.environment import describe_environment
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.models.patching import patch_model
from vlm_dist.models.sequence import SequenceCut, cut_rows
from vlm_dist.quiet import quiet_libraries
from vlm_dist.run_dir import write_json

LARGEST = 4


def cut_batch(processor: Any) -> dict[str, torch.Tensor]:
    """One row, its tokens a multiple of all N."""
    batch = batch_of(processor)
    missing = -batch["input_ids"].shape[1] % LARGEST
    for name in ("input_ids", "attention_mask", "labels", "mm_token_type_ids", "token_type_ids"):
        if name in batch:
            last = batch[name][:, -1:].expand(-1, missing)
            batch[name] = torch.cat([batch[name], last], 1)
    batch["labels"] = batch["input_ids"].where(torch.arange(batch["input_ids"].shape[1]) % 10 == 0, IGNORED)
    return batch


def of_part(path: str, number: int, part: int) -> tuple[int, int, int]:
    """Bytes kept, bytes sent, and tokens of the row."""
    lora = LoraConfig(r=8, vision=False)
    model, processor, row = load_model(ModelConfig(name=path, load_in_4bit=False), path, torch.device("cpu"), lora=lora)
    model = add_lora(model, row, lora).train()
    cut = SequenceCut(number, part)
    cut_rows(model, cut)
    patch_model(model, "auto")
    batch = cut_batch(processor)
    with cut.cutting():
        kept = saved_bytes(model, batch)
    return kept, cut.sent, batch["input_ids"].shape[1]


def sent_in_theory(path: str, number: int, tokens: int) -> int:
    """Bytes in float32, forward and backward."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(path).get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads
    return 2 * 4 * text.num_hidden_layers * heads * size * tokens // number * (number - 1) // number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["llava", "qwen2_5_vl", "qwen3_vl"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    rows = []
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            path, whole = build(family, Path(folder)), 0
            for number in (1, 2, LARGEST):
                found = [of_part(path, number, part) for part in range(number)]
                kept, sent, tokens = max(found)
                whole = whole or kept
                row = {"family": family, "ranks": number, "tokens": tokens, "kept": kept, "of_whole": kept / whole, "sent": sent}
                rows.append(row | {"sent_in_theory": sent_in_theory(path, number, tokens)})
                print(f"{family:12} N={number} {tokens} tokens: {kept / 2**20:.2f} MiB kept ({kept / whole:.3f}), {sent / 2**20:.2f} sent")
    if arguments.out:
        write_json(arguments.out, {"environment": describe_environment(distributed.start()), "results": rows})


if __name__ == "__main__":
    main()
