"""Two pretrained parts -> the checkpoint of a mini VLM; and what their configurations tell of it before any weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor

from vlm_dist.errors import ModelError
from vlm_dist.models.mini_vlm import (
    CAPTION_TEMPLATE,
    PICTURE,
    MiniVLM,
    MiniVLMConfig,
    MiniVLMProcessor,
    VisionProjector,
    features_of,
    make_encoder,
    width_of,
)
from vlm_dist.models.source import looks_like_path, weight_files
from vlm_dist.upstream.transformers import writes_text

# Chat templates of language models expect text; a message's parts become text before.
PARTS_TO_TEXT = (
    "{%- set ns = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message.content is string or not message.content -%}{%- set ns.messages = ns.messages + [message] -%}{%- else -%}"
    "{%- set said = namespace(text='') -%}{%- for part in message.content -%}"
    "{%- set said.text = said.text + ('" + PICTURE + "' if part.type == 'image' else part.text) -%}{%- endfor -%}"
    "{%- set ns.messages = ns.messages + [dict(message, content=said.text)] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = ns.messages -%}"
)


@dataclass(frozen=True)
class Parts:
    """What is known of a mini VLM before its weights are read."""

    vision_config: Any
    images: Any
    """The image processor."""
    text_config: Any
    tokenizer: Any
    image_tokens: int
    """Of one picture."""
    vision_width: int
    chat_template: str
    speaks_as: str
    """Whose chat template that is, in words."""

    def config(self) -> MiniVLMConfig:
        """Of the model that is made of them; the picture's token is yet to be added."""
        return MiniVLMConfig(vision_config=self.vision_config, text_config=self.text_config, vision_width=self.vision_width)

    def __str__(self) -> str:
        return (
            f"{self.vision_config.model_type} ({self.image_tokens} tokens of {self.vision_width} a picture) and "
            f"{self.text_config.model_type} (width {width_of(self.text_config)}), {self.speaks_as}"
        )


def read_parts(vision: str, language: str) -> Parts:
    """Read configurations, image processor and tokenizer, and measure the encoder by running its code without weights.

    Args:
        vision: a folder or hub id with a vision encoder (ViT, CLIP, SigLIP, DINOv2, ConvNeXt, ResNet, timm, ...) and its image processor.
        language: a folder or hub id with a causal language model and its tokenizer.

    Raises:
        ModelError: one of them is no such model, its weights are not there, or are not safetensors.
    """
    for part, name in (("vision", vision), ("language", language)):
        if looks_like_path(name) and not Path(name).is_dir():
            raise ModelError(f"model.mini_vlm.{part}: '{name}' is no folder here; give one that holds such a model, or a hub id")
    vision_config = _load(AutoConfig, vision)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    images = _storable(_load(AutoImageProcessor, vision), vision)
    images.do_convert_rgb = True  # ViT's fails on a grey picture
    text_config = _load(AutoConfig, language)
    if not writes_text(text_config):
        raise ModelError(f"model.mini_vlm.language: '{language}' is of type '{text_config.model_type}', no causal language model")
    tokenizer = _load(AutoTokenizer, language)
    try:
        width_of(text_config)
    except ValueError as error:
        raise ModelError(f"model.mini_vlm.language: '{language}': {error}; give another language model") from None
    for part, name in (("vision", vision), ("language", language)):
        try:
            weight_files(name)
        except ModelError as error:
            raise ModelError(str(error).replace("model.name", f"model.mini_vlm.{part}", 1)) from None
    tokens, width = _measure(vision_config, images, vision)
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    template, whose = (PARTS_TO_TEXT + own, "the language model's chat template") if own else (
        CAPTION_TEMPLATE, "a plain template (the language model has none): the answer continues the prompt")  # fmt: skip
    return Parts(vision_config, images, text_config, tokenizer, tokens, width, template, whose)


def compose(vision: str, language: str, out: Path, *, seed: int = 0) -> Parts:
    """Join two pretrained models (see `read_parts`) through a new projector and write the checkpoint folder `out`.

    Raises:
        ModelError: one of them is no such model.
    """
    parts = read_parts(vision, language)
    torch.manual_seed(seed)
    model = MiniVLM(
        projector=VisionProjector(parts.vision_width, width_of(parts.text_config)),
        vision_encoder=_load(AutoModel, vision, config=parts.vision_config, use_safetensors=True),
        language_model=_load(AutoModelForCausalLM, language, use_safetensors=True),
        tokenizer=parts.tokenizer,
    )
    model.save_pretrained(out)
    processor = MiniVLMProcessor(parts.images, parts.tokenizer, parts.image_tokens, chat_template=parts.chat_template)
    processor.save_pretrained(out)
    return parts


def _storable(images: Any, name: str) -> Any:
    """An image processor that a checkpoint can hold. Transformers' wrapper of timm's transforms is stored nowhere, so the same resizing,
    crop and normalisation stand as CLIPImageProcessor's settings.

    Raises:
        ModelError: timm's transforms add borders, which those settings cannot.
    """
    if type(images).__name__ != "TimmWrapperImageProcessor":
        return images
    from PIL import Image

    told = images.data_config
    height, width = told["input_size"][-2:]
    tall, wide = (math.floor(side / told["crop_pct"]) for side in (height, width))
    squashed = told.get("crop_mode") == "squash"
    if told.get("crop_mode") == "border" or (tall != wide and not squashed):
        raise ModelError(
            f"model.mini_vlm.vision: '{name}' wants pictures of {width} x {height}, crop_mode={told.get('crop_mode')}; an encoder of timm "
            "needs square pictures, cropped in the centre or squashed"
        )
    return CLIPImageProcessor(
        size={"height": tall, "width": wide} if squashed else {"shortest_edge": tall},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[told["interpolation"].upper()],
        image_mean=list(told["mean"]),
        image_std=list(told["std"]),
    )


def _measure(config: Any, images: Any, name: str) -> tuple[int, int]:
    """(tokens, width) of one picture, as the image processor makes it, by the encoder's own code without data.

    Raises:
        ModelError: it takes more than pixels, or gives neither a sequence nor a map.
    """
    from PIL import Image

    made = images(Image.new("RGB", (256, 192)), return_tensors="pt")
    sizes = [getattr(config, "hidden_size", None), *reversed(getattr(config, "hidden_sizes", None) or [])]
    width = next((size for size in sizes if isinstance(size, int)), None)
    try:
        with torch.device("meta"):
            encoder = make_encoder(config).eval()
            pixels = torch.empty(made["pixel_values"].shape)
        with torch.no_grad():
            features = features_of(encoder(pixel_values=pixels), width)
    except Exception as error:  # a model's code raises whatever it likes
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(
            f"model.mini_vlm.vision: '{name}' ({config.model_type}) cannot be used on pixels alone: {why}; give an encoder of pictures of "
            "one size, such as ViT, CLIP, SigLIP, DINOv2, ConvNeXt or ResNet"
        ) from None
    return features.shape[1], features.shape[2]


def _load(kind: Any, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except (ImportError, OSError, ValueError, KeyError) as error:
        why = str(error).strip().splitlines()[0][:300]
        if not Path(name).exists() and isinstance(error, OSError):
            raise ModelError(f"model.mini_vlm: '{name}' is no folder here and cannot be had from the hub: {why}") from None
        raise ModelError(f"model.mini_vlm: '{name}' cannot be loaded by {kind.__name__}: {why}") from None
