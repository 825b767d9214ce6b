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


@pytest.mark.filterwarnings("ignore:fp16=True needs a GPU")
def test_what_trains_in_fp16_stays_in_float32(llava, tmp_path):
    """TRL would make bfloat16 of a quantised model's adapters, and a GradScaler on a GPU takes no gradients of that."""
    from vlm_dist import FastVisionModel, SFTConfig, SFTTrainer, UnslothVisionDataCollator

    model, processor = FastVisionModel.from_pretrained(llava, load_in_4bit=True, dtype=torch.float16)
    model = FastVisionModel.get_peft_model(model, r=4)
    before = {name: one.clone() for name, one in model.named_parameters() if one.requires_grad}
    arguments = SFTConfig(output_dir=str(tmp_path), fp16=True, report_to="none", dataset_kwargs={"skip_prepare_dataset": True})
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]}
    for fp16, expected in ((True, torch.float32), (False, torch.bfloat16)):
        arguments.fp16 = fp16  # as on a GPU; here the configuration has taken it back
        collator = UnslothVisionDataCollator(model, processor)
        SFTTrainer(model=model, tokenizer=processor, train_dataset=[row], data_collator=collator, args=arguments)
        after = {name: one for name, one in model.named_parameters() if one.requires_grad}
        assert {one.dtype for one in after.values()} == {expected} and after.keys() == before.keys()
        assert not fp16 or all(torch.equal(after[name], one) for name, one in before.items())


@pytest.mark.filterwarnings("ignore:fp16=True needs a GPU")
def test_adapters_that_the_trainer_makes_are_in_float32_too(llava, tmp_path):
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration, LlavaProcessor

    from vlm_dist import SFTConfig, SFTTrainer, UnslothVisionDataCollator

    model = LlavaForConditionalGeneration.from_pretrained(llava, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    processor = LlavaProcessor.from_pretrained(llava)
    arguments = SFTConfig(output_dir=str(tmp_path), fp16=True, report_to="none", dataset_kwargs={"skip_prepare_dataset": True})
    arguments.fp16 = True
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]}
    collator, lora = UnslothVisionDataCollator(model, processor), LoraConfig(r=4, target_modules=["q_proj"])
    made = SFTTrainer(
        model=model, tokenizer=processor, train_dataset=[row], data_collator=collator, args=arguments, peft_config=lora
    ).model  # fmt: skip
    assert {one.dtype for one in made.parameters() if one.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"bf16": True, "fp16": False}, (True, False)),
        ({}, (True, False)),
        ({"fp16": True}, (True, None)),
        ({"bf16": False, "fp16": False}, (False, False)),
    ],
)
def test_a_card_that_emulates_bfloat16(monkeypatch, given, expected):
    """A T4, of which torch.cuda.is_bf16_supported() says yes."""
    import warnings

    from vlm_dist.unsloth.sft import _as_the_machine_can

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = _as_the_machine_can(given)
    assert (found.get("fp16"), found.get("bf16")) == expected
    assert ["Tesla T4 only emulates bfloat16" in str(one.message) for one in said] == [True] * (found != given)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert _as_the_machine_can(given) == given
