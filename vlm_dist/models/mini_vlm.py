"""MiniVLM: any Hugging Face vision encoder + a small projector + any causal language model.

The encoder's whole output (a sequence, its class token included, or a map, row by row) is projected and stands in the text where the
picture does. Importing this module registers the architecture with transformers: AutoConfig, AutoModelForImageTextToText and AutoProcessor
then know it. It needs torch and transformers only: a copy of it lies beside every checkpoint, which so loads without vlm_dist too, with
`trust_remote_code=True`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast

PICTURE = "<image>"
# For a language model without a chat template: the picture and the prompt, then the caption as the prompt's continuation:
# "<image>This image shows" + " a dog ." + end of text.
CAPTION_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %} {% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% elif message.role == 'system' %}\n{% endif %}{% endfor %}"
)


class MiniVLMConfig(PreTrainedConfig):
    """The two parts' own configurations, the id that marks a picture's tokens (it needs no row in the embedding), and the width of the
    encoder's features where its configuration names none."""

    model_type = "mini_vlm"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 0
    vision_width: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))


class VisionProjector(torch.nn.Module):
    """[N, tokens, vision width] -> [N, tokens, language width]: Linear, GELU, LayerNorm, Linear."""

    def __init__(self, vision_dim: int, language_dim: int):
        super().__init__()
        self.vision_dim = vision_dim
        self.projection = torch.nn.Sequential(
            torch.nn.Linear(vision_dim, language_dim),
            torch.nn.GELU(),
            torch.nn.LayerNorm(language_dim),
            torch.nn.Linear(language_dim, language_dim),
        )

    def forward(self, vision_features: torch.Tensor) -> torch.Tensor:
        return self.projection(vision_features)


class MiniVLMPreTrainedModel(PreTrainedModel):
    language_model: Any
    config_class = MiniVLMConfig
    base_model_prefix = "model"
    input_modalities: ClassVar = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.set_input_embeddings(value)


class MiniVLMModel(MiniVLMPreTrainedModel):
    """Vision encoder, projector and language model; gives hidden states. The language model stays whole, its head included, because
    some architectures scale or cap their logits."""

    def __init__(self, config: MiniVLMConfig):
        super().__init__(config)
        self.vision_encoder = make_encoder(config.vision_config)
        self.projector = VisionProjector(config.vision_width or width_of(config.vision_config), width_of(config.text_config))
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, 3, height, width] -> [N, tokens, language width]."""
        return self.projector(features_of(self.vision_encoder(pixel_values=pixel_values), self.projector.vision_dim))

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """[B, T] token ids, [N, 3, height, width] pictures -> [B, T, language width].

        Raises:
            ValueError: the number of picture tokens is not the number of picture features.
        """
        is_picture = input_ids == self.config.image_token_id
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_picture, 0))
        if pixel_values is None:
            return embeddings
        features = self.encode_image(pixel_values.to(embeddings.dtype)).to(embeddings.dtype).flatten(0, 1)
        if int(is_picture.sum()) != len(features):
            raise ValueError(f"{int(is_picture.sum())} picture tokens in the text, {len(features)} features from the pictures")
        return embeddings.masked_scatter(is_picture.unsqueeze(-1), features)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Hidden states of the last layer; arguments as in `MiniVLM.forward`."""
        if inputs_embeds is None:
            assert input_ids is not None, "give input_ids or inputs_embeds"
            inputs_embeds = self.embed(input_ids, pixel_values)
        return self.language_model.base_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options)


class MiniVLM(MiniVLMPreTrainedModel, GenerationMixin):
    """Vision encoder, projector, causal language model.

    Made from a configuration, or from parts in hand, given by name. These stay as they are; the tokenizer gets `<image>` if it lacks it.
    """

    embeds_picture_tokens = False  # features take their places before anything is looked up

    def __init__(
        self, config: MiniVLMConfig | None = None, *, vision_encoder: Any = None, language_model: Any = None,
        projector: VisionProjector | None = None, tokenizer: Any = None,
    ):  # fmt: skip
        if config is not None:
            super().__init__(config)
            self.model = MiniVLMModel(config)
            self.post_init()
            return
        if vision_encoder is None or language_model is None or projector is None or tokenizer is None:
            raise ValueError("MiniVLM: give a config, or all of vision_encoder, language_model, projector and tokenizer")
        picture = add_picture_token(tokenizer)
        parts = {"vision_config": vision_encoder.config, "text_config": language_model.config}
        config = MiniVLMConfig(**parts, image_token_id=picture, vision_width=projector.vision_dim)
        super().__init__(config)
        with torch.device("meta"):
            self.model = MiniVLMModel(config)
            self.post_init()
        self.model.vision_encoder, self.model.language_model, self.model.projector = vision_encoder, language_model, projector
        self.generation_config = language_model.generation_config
        self.generation_config.pad_token_id = tokenizer.pad_token_id

    @property
    def vision_encoder(self) -> Any:
        return self.model.vision_encoder

    @property
    def projector(self) -> VisionProjector:
        return self.model.projector

    @property
    def language_model(self) -> Any:
        return self.model.language_model

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> Any:
        return self.language_model.get_decoder()

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, 3, height, width] -> [N, tokens, language width]."""
        return self.model.encode_image(pixel_values)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids: [B, T], with the picture's id where its tokens stand.
            pixel_values: [N, 3, height, width]: the N pictures of the batch, one after another.
            labels: [B, T]; -100 is ignored, and so is every picture token.
            options: whatever the language model takes: past_key_values, logits_to_keep, ...

        Raises:
            ValueError: the number of picture tokens is not the number of picture features.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "give input_ids or inputs_embeds"
            inputs_embeds = self.model.embed(input_ids, pixel_values)
            if labels is not None:
                labels = labels.masked_fill(input_ids == self.config.image_token_id, -100)
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **options)

    def save_pretrained(self, *arguments: Any, **options: Any) -> Any:
        """Under the names of `state_dict`. (transformers 5.23 would write those that rules for the parts alone lead to.)"""
        self._weight_conversions = []
        return super().save_pretrained(*arguments, **options)

    def prepare_inputs_for_generation(self, input_ids: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
        """The pictures go in with the prompt; afterwards the KV cache holds them."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs


class MiniVLMProcessor(ProcessorMixin):
    """Pictures -> pixels of one size; `<image>` in the text -> as many picture tokens as the vision encoder gives."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, num_image_tokens: int = 197, chat_template: str | None = None):
        self.num_image_tokens = num_image_tokens
        self.image_token = PICTURE
        self.image_token_id = tokenizer.convert_tokens_to_ids(PICTURE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return PICTURE * self.num_image_tokens


def add_picture_token(tokenizer: Any) -> int:
    """Teach the tokenizer `<image>`, and padding if it has none; the id of the picture's token."""
    tokenizer.add_special_tokens({"additional_special_tokens": [PICTURE]})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(PICTURE)


def make_encoder(config: Any) -> Any:
    """The vision encoder of a configuration; its own attention where it has none of the kind that was asked of the whole model."""
    try:
        return AutoModel.from_config(config)
    except ValueError as error:
        if "attention" not in str(error):
            raise
        return AutoModel.from_config(config, attn_implementation="eager")


def features_of(output: Any, width: int | None = None) -> torch.Tensor:
    """What an encoder gave -> [N, tokens, width]: its last hidden states (or its last feature map), a map row by row.

    Args:
        width: of a feature, which tells the channels of a map [N, width, rows, columns] from those of [N, rows, columns, width].

    Raises:
        ValueError: it is neither a sequence nor a map.
    """
    found = getattr(output, "last_hidden_state", None)
    if found is None:
        maps = getattr(output, "feature_maps", None)
        found = maps[-1] if maps else None
    if found is None or found.ndim not in (3, 4):
        shape = "nothing" if found is None else f"a tensor of shape {tuple(found.shape)}"
        raise ValueError(f"the vision encoder gives {shape}; a sequence [N, tokens, width] or a map [N, width, rows, columns] is needed")
    if found.ndim == 3:
        return found
    last = width is not None and found.shape[1] != width and found.shape[-1] == width
    return found.flatten(1, 2) if last else found.flatten(2).transpose(1, 2)


def width_of(config: Any) -> int:
    """Hidden size, by whatever name the architecture has for it.

    Raises:
        ValueError: by none.
    """
    for name in ("hidden_size", "n_embd", "d_model"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise ValueError(f"mini_vlm: the configuration of '{config.model_type}' names no hidden size")


if __name__.startswith("vlm_dist."):  # and not the copy beside a checkpoint
    AutoConfig.register(MiniVLMConfig.model_type, MiniVLMConfig)
    AutoModelForImageTextToText.register(MiniVLMConfig, MiniVLM)
    AutoProcessor.register(MiniVLMConfig, MiniVLMProcessor)
    MiniVLMConfig.register_for_auto_class("AutoConfig")
    MiniVLM.register_for_auto_class("AutoModelForImageTextToText")
    MiniVLMProcessor.register_for_auto_class("AutoProcessor")
