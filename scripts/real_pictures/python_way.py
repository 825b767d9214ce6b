"""The same from Python, by Unsloth's names: parts joined, LoRA on the language model, the projector trained, TRL's trainer.

    python scripts/real_pictures/python_way.py FOLDER OUT [--steps 600]

after scripts/real_pictures.sh has filled FOLDER. `vlm-dist eval OUT --data 'FOLDER/shards/heldout/*.tar'` scores what it writes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_dist import FastVisionModel, SFTConfig, SFTTrainer, UnslothVisionDataCollator
from vlm_dist.models.compose import compose


def conversation(record: dict[str, Any], pictures: Path) -> dict[str, Any]:
    """A record of questions.py -> messages of parts, the picture loaded."""
    system, user, assistant = (turn["content"] for turn in record["messages"])
    picture = Image.open(pictures / record["image"]).convert("RGB")
    asked = [{"type": "image", "image": picture}, {"type": "text", "text": user.removeprefix("<image>")}]
    return {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": assistant}]},
        ]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The demonstration by Unsloth's names")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    folder, base = arguments.folder, arguments.folder / "joined"
    if not (base / "model.safetensors").exists():
        print(compose(str(folder / "vision"), str(folder / "language"), base))
    model, processor = FastVisionModel.from_pretrained(str(base), load_in_4bit=False, max_seq_length=128)
    model = FastVisionModel.get_peft_model(
        model, r=16, lora_alpha=32, finetune_vision_layers=False, finetune_mlp_modules=False, modules_to_save=["projector"]
    )
    wanted = arguments.steps * arguments.batch
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()[:wanted]]
    settings = SFTConfig(
        per_device_train_batch_size=arguments.batch, max_steps=arguments.steps, learning_rate=1e-3, warmup_steps=10, seed=0,
        lr_scheduler_type="cosine", logging_steps=5, output_dir=str(arguments.out / "trainer"), report_to="none", save_strategy="no",
        remove_unused_columns=False, dataset_text_field="", dataset_kwargs={"skip_prepare_dataset": True}, max_seq_length=128,
    )  # fmt: skip
    FastVisionModel.for_training(model, use_gradient_checkpointing=False)
    trainer = SFTTrainer(
        model=model, tokenizer=processor, data_collator=UnslothVisionDataCollator(model, processor), args=settings,
        train_dataset=[conversation(record, folder / "pictures") for record in records],
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(str(arguments.out))
    processor.save_pretrained(str(arguments.out))


if __name__ == "__main__":
    main()
