"""What each architecture does here, measured on its tiny checkpoint, as the table of docs/models.md.

    python scripts/families_table.py                      # a table on the terminal
    python scripts/families_table.py --page docs/models.md --out docs/benchmarks/families.json

Tiny checkpoints are the real architectures with random weights and their real processors; numbers of layers are those of the tiny ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm_dist import distributed
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.environment import describe_environment
from vlm_dist.models.export import save_pretrained_merged
from vlm_dist.models.generate import generate
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora, find_targets
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.trained import load_trained
from vlm_dist.quiet import quiet_libraries
from vlm_dist.run_dir import write_json, write_text
from vlm_dist.testing import tiny_checkpoint, tiny_families

CPU = torch.device("cpu")
COLOURS = {"red": "a red circle", "blue": "top left", "green": "two", "white": "three yellow squares"}
BEGIN, END = "<!-- made by scripts/families_table.py -->", "<!-- end -->"
COLUMNS = (
    "`tiny_checkpoint`", "`model_type`", "layers in NF4", "adapters: vision attention, MLP", "language attention, MLP", "projector",
    "with gradient", "another picture moves the loss by", "4 samples, 30 steps: loss", "answers after", "saved and loaded",
    "merged onto dequantised: logits",
)  # fmt: skip


def samples() -> list[Sample]:
    found = []
    for number, (colour, answer) in enumerate(COLOURS.items()):
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        found.append(Sample(str(number), "", [question, reply], [Image.new("RGB", (40 + 10 * number, 40), colour)]))
    return found


def measure(family_name: str, folder: Path) -> dict[str, Any]:
    from bitsandbytes.nn.modules import Linear4bit

    base = str(tiny_checkpoint(family_name, folder / "base"))
    model, processor, family = load_model(ModelConfig(name=base), base, CPU)
    row: dict[str, Any] = {"model_type": family.model_type, "nf4": sum(isinstance(module, Linear4bit) for module in model.modules())}
    for side in ("vision", "language"):
        for kind in ("attention", "mlp"):
            switches: dict[str, Any] = {"vision": False, "language": False, "attention": False, "mlp": False, side: True, kind: True}
            row[f"{side}_{kind}"] = len(find_targets(model, family, LoraConfig(**switches)))
    only_projector = LoraConfig(vision=False, language=False, projector="lora")
    row["projector"] = len(find_targets(model, family, only_projector))

    torch.manual_seed(0)
    lora = LoraConfig(r=16, projector="lora" if row["projector"] else "frozen")
    adapted = add_lora(model, family, lora).train()
    encoder = Encoder(processor, 1024)
    data = collate([encoder.encode(sample) for sample in samples()], processor.tokenizer.pad_token_id)
    first = samples()[0]
    row["picture"] = moved_by_another_picture(adapted, encoder, first)
    row |= overfit(adapted, data)
    prompt = collate([encoder.encode_prompt(first.messages[:1], first.images)], processor.tokenizer.pad_token_id, side="left")
    row["answer"] = generate(adapted, processor, prompt, 12)[0]

    save_pretrained_merged(adapted, str(folder / "lora"), processor, "lora")
    again, _ = load_trained(str(folder / "lora"), CPU)  # checks base, processor, keys and probe
    with torch.no_grad():
        row["reloaded"] = float((summed_loss(again.train(), data) - summed_loss(adapted.train(), data)).abs())
    comparison = save_pretrained_merged(adapted, str(folder / "merged"), processor, onto="dequantised")
    assert comparison is not None
    row["merged"] = comparison.largest_logit_difference / comparison.logit_spread
    return row


def overfit(model: Any, data: dict[str, Any]) -> dict[str, Any]:
    """30 AdamW steps on one batch; and how many trainable tensors have got a gradient by the second."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01, betas=(0.9, 0.95))
    losses, fed = [], 0
    for step in range(30):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (step + 1) / 5)
        loss = summed_loss(model, data)
        loss.backward()
        if step == 1:  # at the first, lora_B is zero and hides lora_A's
            fed = sum(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trainable)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"trainable": len(trainable), "with_gradient": fed, "first_loss": losses[0], "best_loss": min(losses)}


def moved_by_another_picture(model: Any, encoder: Encoder, sample: Sample) -> float:
    """Difference of the summed loss between the sample and the same words on a black picture."""
    pad = encoder.processor.tokenizer.pad_token_id
    other = Sample(sample.key, "", sample.messages, [Image.new("RGB", sample.images[0].size, "black")])
    with torch.no_grad():
        pair = [summed_loss(model, collate([encoder.encode(one)], pad)) for one in (sample, other)]
    return float((pair[0] - pair[1]).abs())


def as_line(name: str, row: dict[str, Any]) -> str:
    fall = 1 - row["best_loss"] / row["first_loss"]
    cells = [
        name, row["model_type"], row["nf4"], f"{row['vision_attention']}, {row['vision_mlp']}",
        f"{row['language_attention']}, {row['language_mlp']}", row["projector"] or "no linear layer",
        f"{row['with_gradient']} of {row['trainable']}", f"{row['picture']:.2g}",
        f"{row['first_loss']:.1f} → {row['best_loss']:.2f} (-{fall:.1%})", f"“{row['answer']}”", f"± {row['reloaded']:.1g}",
        f"± {row['merged']:.1%} of their spread",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="put the table between the marks of this page")
    parser.add_argument("--out", type=Path, help="raw results as JSON")
    arguments = parser.parse_args()
    quiet_libraries()
    started = time.monotonic()
    rows = {}
    for name in tiny_families():
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(name, Path(folder))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *(as_line(name, row) for name, row in rows.items())]
    print("\n".join(lines))
    if arguments.page:
        text = arguments.page.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        write_text(arguments.page, f"{head}{BEGIN}\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2])
    if arguments.out:
        write_json(arguments.out, {"environment": describe_environment(distributed.start()), "families": rows})
    print(f"{len(rows)} families in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
