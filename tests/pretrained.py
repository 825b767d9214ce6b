"""Tiny vision encoders and language models in folders, as one downloads them: the parts of a mini VLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from vlm_dist.testing.parts import CLIP, small_text, small_tokenizer

SIZES = {**CLIP, "image_size": 32}
SIZE = {"height": 32, "width": 32}
STAGES = {"hidden_sizes": [16, 24], "depths": [1, 1]}
# As SmolLM2-Instruct's: text only, a system turn by itself, no word about pictures.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<turn>system\nBe brief.</s>\n' }}{% endif %}"
    "{{'<turn>' + message['role'] + '\n' + message['content'] + '</s>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)


def language_model(folder: Path, name: str) -> str:
    """Folder of a tiny causal language model with its tokenizer (which has no token for pictures); "chat" has a chat template."""
    if not (folder / name).exists():
        tokenizer, ids = small_tokenizer()
        sizes = small_text(len(ids))
        config = {
            "llama": lambda: hf.LlamaConfig(**sizes, tie_word_embeddings=True),
            "chat": lambda: hf.LlamaConfig(**sizes, tie_word_embeddings=True),
            "qwen2": lambda: hf.Qwen2Config(**sizes),
            "gpt2": lambda: hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=len(ids), bos_token_id=1, eos_token_id=2),
            "gemma2": lambda: hf.Gemma2Config(**sizes, head_dim=16, final_logit_softcapping=5.0),
        }[name]()
        if name == "chat":
            tokenizer.chat_template = CHATML
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.25)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def vision_encoder(folder: Path, name: str) -> str:
    """Folder of a tiny vision encoder with its image processor; "clip" is a whole CLIP with its text half, "resnet_backbone" a backbone."""
    if not (folder / name).exists():
        torch.manual_seed(1)
        for part in ENCODERS[name]():
            part.save_pretrained(folder / name)
    return str(folder / name)


def _images() -> hf.BitImageProcessor:
    return hf.BitImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)


def _resnet_sizes() -> dict:
    return {"embedding_size": 16, "layer_type": "basic", **STAGES}


def timm_model(architecture: str, crop: str, **arguments: Any) -> Any:
    pictures = {
        "input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "crop_pct": 0.875,
        "crop_mode": crop,
    }  # fmt: skip
    config = hf.TimmWrapperConfig(architecture=architecture, num_labels=0, model_args=arguments, pretrained_cfg=pictures)
    return hf.TimmWrapperModel(config)


ENCODERS = {
    "vit": lambda: (hf.ViTModel(hf.ViTConfig(**SIZES)), hf.ViTImageProcessor(size=SIZE)),
    "vit224": lambda: (hf.ViTModel(hf.ViTConfig(**{**SIZES, "image_size": 224})), hf.ViTImageProcessor()),
    "clip": lambda: (
        hf.CLIPModel(hf.CLIPConfig(vision_config=SIZES, text_config=small_text(400), projection_dim=32)),
        hf.CLIPImageProcessor(size=SIZE, crop_size=SIZE),
    ),
    "siglip": lambda: (hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES)), hf.SiglipImageProcessor(size=SIZE)),
    "siglip2_of_any_shape": lambda: (
        hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**{k: v for k, v in SIZES.items() if k != "image_size"}, num_patches=16)),
        hf.Siglip2ImageProcessor(patch_size=16, max_num_patches=16),
    ),
    "dinov2": lambda: (
        hf.Dinov2Model(hf.Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16)),
        _images(),
    ),
    "dinov3": lambda: (
        hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(
                hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16,
                num_register_tokens=2,
            )
        ),
        hf.DINOv3ViTImageProcessor(size=SIZE),
    ),
    "resnet": lambda: (hf.ResNetModel(hf.ResNetConfig(**_resnet_sizes())), _images()),
    "resnet_backbone": lambda: (hf.ResNetBackbone(hf.ResNetConfig(**_resnet_sizes())), _images()),
    "convnext": lambda: (hf.ConvNextModel(hf.ConvNextConfig(num_stages=2, **STAGES)), _images()),
    "efficientnet": lambda: (
        hf.EfficientNetModel(hf.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.25, image_size=32, hidden_dim=320)),
        hf.EfficientNetImageProcessor(size=SIZE),
    ),
    "swin": lambda: (
        hf.SwinModel(hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)),
        hf.ViTImageProcessor(size=SIZE),
    ),
    "timm": lambda: (timm_model("resnet10t", "center"),),  # its pictures' settings lie in its own config.json
    "timm_vit": lambda: (timm_model("vit_tiny_patch16_224", "squash", depth=2, img_size=32),),
    "timm_border": lambda: (timm_model("resnet10t", "border"),),
}  # fmt: skip
