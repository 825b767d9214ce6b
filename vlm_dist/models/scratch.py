"""A new LLaVA of any size: CLIP vision tower, two-layer projector, Llama, and a tokenizer trained on the data's texts.

For the quickstart and for experiments: what it writes is an ordinary checkpoint folder, loaded like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlm_dist.config import ScratchConfig

PAD, BOS, EOS, PICTURE = "<pad>", "<s>", "</s>", "<image>"
# LLaVA 1.5's format. The answer begins with a space, so that its first word is the same token as inside a sentence.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}ASSISTANT: {% elif message.role == 'user' %}USER: {% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{{ '</s>' if message.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_checkpoint(config: ScratchConfig, texts: Iterable[str], seed: int, out: Path) -> None:
    """Write model (random weights), tokenizer and processor into the folder `out`."""
    import torch
    import transformers as hf

    tokenizer = _train_tokenizer(texts, config.vocab_size)
    ids = tokenizer.get_vocab()
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(
            size={"height": config.image_size, "width": config.image_size},
            crop_size={"height": config.image_size, "width": config.image_size},
        ),
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    language = hf.LlamaConfig(
        hidden_size=config.language_width,
        intermediate_size=max(64, config.language_width * 8 // 3 // 64 * 64),
        num_hidden_layers=config.language_layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        vocab_size=len(tokenizer),
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    torch.manual_seed(seed)
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=vision,
            text_config=language,
            image_token_index=ids[PICTURE],
            vision_feature_select_strategy="default",
            vision_feature_layer=-1,
        )
    )
    model.generation_config.eos_token_id = ids[EOS]
    model.generation_config.pad_token_id = ids[PAD]
    model.save_pretrained(out)
    processor.save_pretrained(out)


def _train_tokenizer(texts: Iterable[str], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, PICTURE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *["USER: ASSISTANT:"] * 100], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS,
        additional_special_tokens=[PICTURE], model_max_length=1_000_000,
    )  # fmt: skip
