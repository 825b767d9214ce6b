"""The vision workflow that Unsloth's users know, with TRL and datasets themselves, on every family: load, adapt, format, train, save."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

COLOURS = ("red", "blue", "green", "yellow")


def format_vision_data(examples):
    """Step 4 of the workflow, as its users write it."""
    formatted = []
    for img_path, instruction, response in zip(examples["image"], examples["instruction"], examples["response"], strict=True):
        content = [{"type": "image", "image": img_path}, {"type": "text", "text": instruction}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": response}]}]
        formatted.append({"messages": messages})
    return {"formatted": formatted}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fp16=True needs a GPU")
def test_workflow(any_checkpoint, tmp_path, monkeypatch):
    from datasets import load_dataset
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlm_dist import FastVisionModel, SFTConfig, SFTTrainer, UnslothVisionDataCollator

    if any_checkpoint.endswith("glm4v_moe"):
        pytest.skip("transformers' own loss of GLM-4.5V asks its configuration for num_experts, which is called otherwise there")
    monkeypatch.chdir(tmp_path)
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (70, 50), colour).save(f"{colour}.png")
        rows.append({"image": str(tmp_path / f"{colour}.png"), "instruction": "What colour is it?", "response": colour})
    (tmp_path / "vision_train.json").write_text(json.dumps(rows))

    model, tokenizer = FastVisionModel.from_pretrained(model_name=any_checkpoint, max_seq_length=2048, load_in_4bit=True, dtype=None)
    model = FastVisionModel.get_peft_model(
        model,
        r=16,
        target_modules="all-linear",
        finetune_vision_layers=True,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    dataset = load_dataset("json", data_files="vision_train.json", split="train").map(format_vision_data, batched=True)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=dataset,
        data_collator=UnslothVisionDataCollator(model, tokenizer),
        args=SFTConfig(
            max_seq_length=2048,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            learning_rate=5e-3,
            warmup_steps=2,
            max_steps=10,
            logging_steps=1,
            output_dir="vision_outputs",
            optim="adamw_8bit",
            fp16=not torch.cuda.is_bf16_supported(),
            bf16=torch.cuda.is_bf16_supported(),
            remove_unused_columns=False,
            dataset_text_field="",
            dataset_kwargs={"skip_prepare_dataset": True},
            report_to="none",
        ),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0], losses

    model.save_pretrained("vision_lora_model")
    tokenizer.save_pretrained("vision_lora_model")
    base = AutoModelForImageTextToText.from_pretrained(any_checkpoint)
    loaded = PeftModel.from_pretrained(base, "vision_lora_model")
    trained = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    again = dict(loaded.named_parameters())
    assert trained and all(torch.equal(again[name], parameter) for name, parameter in trained.items())
    assert AutoProcessor.from_pretrained("vision_lora_model").chat_template == tokenizer.chat_template

    FastVisionModel.for_inference(model)
    comparison = model.save_pretrained_merged("vision_merged", tokenizer, save_method="merged_16bit", onto="dequantised")
    assert comparison.largest_logit_difference < 0.25 * comparison.logit_spread, comparison
    merged = AutoModelForImageTextToText.from_pretrained("vision_merged")
    assert merged.dtype == torch.bfloat16 and AutoProcessor.from_pretrained("vision_merged").chat_template == tokenizer.chat_template


def test_contradicting_names_are_refused():
    from vlm_dist import SFTConfig, UserError

    with pytest.raises(UserError, match="contradict"):
        SFTConfig(max_seq_length=5, max_length=6, output_dir="x")
    with pytest.warns(UserWarning, match="bf16=True needs a GPU"):
        assert not SFTConfig(bf16=True, max_seq_length=5, output_dir="x", report_to="none").bf16
