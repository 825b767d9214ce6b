"""What the builders share: sizes, a byte-level BPE tokenizer trained on the spot, chat templates in the style of each family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TEXTS = [
    "a red circle top left and a blue square bottom right",
    "What colour is the triangle? How many shapes are there? Where is the cross?",
    "Describe the picture. green yellow purple orange one two three user assistant system model",
]


def train_tokenizer(
    special: list[str], *, pad: str, eos: str, bos: str | None = None, texts: Sequence[str] = TEXTS, **settings: Any
) -> Any:
    """A fast tokenizer whose first ids are the special tokens, in order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*texts] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos, additional_special_tokens=special, **settings
    )


def turns(start: str, end: str, picture: str, *, video: str = "", before: str = "", assistant: str = "assistant") -> str:
    """A chat template: START + role + newline + content + END for each turn, `before` once at the beginning."""
    videos = f"{{% elif part.type == 'video' %}}{video}" if video else ""
    role = f"{{{{ '{assistant}' if message.role == 'assistant' else message.role }}}}"
    return (
        f"{before}{{% for message in messages %}}{start}{role}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        f"{{% if part.type == 'image' %}}{picture}{videos}{{% else %}}{{{{ part.text }}}}{{% endif %}}{{% endfor %}}{{% endif %}}{end}\n"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{start}{assistant}\n{{% endif %}}"
    )


CLIP: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
PLAIN = ["<pad>", "<s>", "</s>"]


def small_text(vocab_size: int, **changes: Any) -> dict[str, Any]:
    """Sizes of a language model that reads `small_tokenizer`'s ids."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return {**sizes, **changes}


def small_tokenizer(*pictures: str, **settings: Any) -> tuple[Any, dict[str, int]]:
    """A tokenizer with the plain special tokens and these picture tokens, and its ids by token."""
    tokenizer = train_tokenizer([*PLAIN, "<turn>", *pictures], pad="<pad>", eos="</s>", bos="<s>", **settings)
    return tokenizer, tokenizer.get_vocab()


def template(picture: str, video: str = "") -> str:
    """A chat template for `small_tokenizer`, with `picture` where a picture and `video` where a video stands."""
    return turns("<turn>", "</s>", picture, video=video, before="<s>")
