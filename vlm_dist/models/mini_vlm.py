"""MiniVLM: any Hugging Face vision encoder + a small projector + any causal language model.

The encoder's whole output sequence (class token included) is projected and stands in the text where the picture does. Importing this
module registers the architecture with transformers: AutoConfig, AutoModelForImageTextToText and AutoProcessor then know it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlm_dist.errors import ModelError

PICTURE = "<image>"
# The picture and the prompt, then the caption as the prompt's continuation: "<image>This image shows" + " a dog ." + end of text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %} {% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% elif message.role == 'system' %}\n{% endif %}{% endfor %}"
)


class MiniVLMConfig(PreTrainedConfig):
    """The two parts' own configurations, and the id that marks a picture's tokens (it needs no row in the embedding)."""

    model_type = "mini_vlm"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))


class VisionProjector(torch.nn.Module):
    """[N, tokens, vision width] -> [N, tokens, language width]: Linear, GELU, LayerNorm, Linear."""

    def __init__(self, vision_dim: int, language_dim: int):
        super().__init__()
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
        self.vision_encoder = AutoModel.from_config(config.vision_config)
        self.projector = VisionProjector(_width(config.vision_config), _width(config.text_config))
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, 3, height, width] -> [N, tokens, language width]."""
        features = self.vision_encoder(pixel_values=pixel_values).last_hidden_state
        return self.projector(features)

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
            raise ModelError("MiniVLM: give a config, or all of vision_encoder, language_model, projector and tokenizer")
        picture = add_picture_token(tokenizer)
        config = MiniVLMConfig(vision_config=vision_encoder.config, text_config=language_model.config, image_token_id=picture)
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


def compose(vision: str, language: str, out: Path, *, seed: int = 0, revision: str | None = None) -> None:
    """Join two pretrained models through a new projector and write the checkpoint folder `out`.

    Args:
        vision: a folder or hub id with a vision encoder (ViT, CLIP, SigLIP, DINOv2, ...) and its image processor.
        language: a folder or hub id with a causal language model and its tokenizer.

    Raises:
        ModelError: one of them is no such model.
    """
    vision_config = _load(AutoConfig, vision)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    images = _load(AutoImageProcessor, vision)
    images.do_convert_rgb = True  # ViT's fails on a grey picture
    tokenizer = _load(AutoTokenizer, language)
    language_dim = _width(_load(AutoConfig, language))
    torch.manual_seed(seed)
    model = MiniVLM(
        projector=VisionProjector(_width(vision_config), language_dim),
        vision_encoder=_load(AutoModel, vision, config=vision_config, use_safetensors=True),
        language_model=_load(AutoModelForCausalLM, language, use_safetensors=True),
        tokenizer=tokenizer,
    )
    count = count_image_tokens(model.vision_encoder, images)
    model.save_pretrained(out)
    MiniVLMProcessor(images, tokenizer, count, chat_template=CHAT_TEMPLATE).save_pretrained(out)


def add_picture_token(tokenizer: Any) -> int:
    """Teach the tokenizer `<image>`, and padding if it has none; the id of the picture's token."""
    tokenizer.add_special_tokens({"additional_special_tokens": [PICTURE]})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(PICTURE)


def count_image_tokens(vision_encoder: Any, image_processor: Any) -> int:
    """How many features the encoder gives for one picture as the image processor makes it."""
    from PIL import Image

    pixels = image_processor(Image.new("RGB", (256, 192)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return vision_encoder(pixel_values=pixels.to(vision_encoder.device, vision_encoder.dtype)).last_hidden_state.shape[1]


def _width(config: Any) -> int:
    """Hidden size, by whatever name the architecture has for it."""
    for name in ("hidden_size", "n_embd", "d_model"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise ModelError(f"mini_vlm: the configuration of '{config.model_type}' names no hidden size; use a transformer encoder or decoder")


def _load(kind: Any, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.mini_vlm: '{name}' cannot be loaded by {kind.__name__}: {str(error).strip().splitlines()[0][:300]}"
        ) from None


AutoConfig.register(MiniVLMConfig.model_type, MiniVLMConfig)
AutoModelForImageTextToText.register(MiniVLMConfig, MiniVLM)
AutoProcessor.register(MiniVLMConfig, MiniVLMProcessor)
