"""Tiny real checkpoints, for tests of this project and of its users: the real architecture built from a config with random weights, its
real processor and chat template, and a tokenizer trained on the spot. A few hundred kilobytes; no download.

    from vlm_dist.testing import tiny_checkpoint
    tiny_checkpoint("qwen2_5_vl", "checkpoints/tiny")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_dist.config import ScratchConfig
from vlm_dist.errors import ModelError

TEXTS = [
    "a red circle top left and a blue square bottom right",
    "What colour is the triangle? How many shapes are there? Where is the cross?",
    "Describe the picture. green yellow purple orange one two three",
]
QWEN_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_checkpoint(family: str, path: str | Path, seed: int = 0) -> Path:
    """Write a checkpoint of `family` (a model_type) into the folder `path`.

    Raises:
        ModelError: there is no builder for this family.
    """
    if family not in BUILDERS:
        raise ModelError(f"tiny_checkpoint: no builder for '{family}'; there are: {', '.join(sorted(BUILDERS))}")
    BUILDERS[family](Path(path), seed)
    return Path(path)


def _llava(path: Path, seed: int) -> None:
    from vlm_dist.models.scratch import build_checkpoint

    sizes = ScratchConfig(
        image_size=32, patch_size=16, vision_width=64, vision_layers=2, language_width=64, language_layers=2, heads=4, vocab_size=400
    )
    build_checkpoint(sizes, TEXTS * 20, seed, path)


def _qwen2_5_vl(path: Path, seed: int) -> None:
    import torch
    import transformers as hf

    tokenizer = _tokenizer(QWEN_TOKENS, pad="<|endoftext|>", eos="<|im_end|>")
    ids = tokenizer.get_vocab()
    processor = hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    )
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": len(ids), "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    torch.manual_seed(seed)
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(path)
    processor.save_pretrained(path)


def _tokenizer(special: list[str], pad: str, eos: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 20, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, additional_special_tokens=special)


BUILDERS: dict[str, Callable[[Path, int], None]] = {"llava": _llava, "qwen2_5_vl": _qwen2_5_vl}
