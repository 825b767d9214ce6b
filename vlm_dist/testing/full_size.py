"""The config.json and processor of published models at full size, without weights and with a tokenizer made on the spot: to plan for them
where there is no network.

    from vlm_dist.testing.full_size import full_size_config
    full_size_config("qwen2.5-vl-7b", "checkpoints/qwen2.5-vl-7b")

Sizes as in the models' own config.json on the hub.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from vlm_dist.errors import ModelError
from vlm_dist.testing import tiny_checkpoint

PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
QWEN2_5_VISION = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31]}


def _qwen2_5(hidden: int, mlp: int, layers: int, heads: int, key_heads: int, vision_mlp: int, vocabulary: int = 152_064) -> dict[str, Any]:
    text = {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "vocab_size": vocabulary, "layer_types": ["full_attention"] * layers,
    }  # fmt: skip
    vision = {**QWEN2_5_VISION, "intermediate_size": vision_mlp, "out_hidden_size": hidden}
    return {"family": "qwen2_5_vl", "text": text, "vision": vision, "rope": {"mrope_section": [16, 24, 24]}, "images": {"size": PIXELS}}


SIZES: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-3b": {**_qwen2_5(2048, 11_008, 36, 16, 2, 3420, 151_936), "tied": True},
    "qwen2.5-vl-7b": _qwen2_5(3584, 18_944, 28, 28, 4, 3420),
    "qwen2.5-vl-32b": _qwen2_5(5120, 27_648, 64, 40, 8, 3456),
    "qwen2.5-vl-72b": _qwen2_5(8192, 29_568, 80, 64, 8, 3456),
    "qwen3-vl-30b-a3b": {
        "family": "qwen3_vl_moe",
        "text": {
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
            "vocab_size": 151_936,
        },
        "vision": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048,
            "deepstack_visual_indexes": [8, 16, 24], "num_position_embeddings": 2304,
        },
        "rope": {"mrope_section": [24, 20, 20]},
        "images": {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}},
    },
    "llava-1.5-7b": {
        "family": "llava",
        "text": {
            "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32_064,
        },
        "vision": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336,
            "patch_size": 14,
        },
        "images": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        "processor": {"patch_size": 14},
    },
}  # fmt: skip


def full_size_config(name: str, path: str | Path) -> Path:
    """Write config.json and processor of a model of SIZES into the folder `path`.

    Raises:
        ModelError: it is not among them.
    """
    from transformers import AutoConfig, AutoProcessor

    if name not in SIZES:
        raise ModelError(f"full_size_config: no sizes of '{name}'; there are: {', '.join(SIZES)}")
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_checkpoint(size["family"], folder)
        config, processor = AutoConfig.from_pretrained(tiny), AutoProcessor.from_pretrained(tiny)
    _change(config.text_config, {"head_dim": size["text"]["hidden_size"] // size["text"]["num_attention_heads"]} | size["text"])
    _change(config.vision_config, size["vision"])
    config.text_config.rope_parameters |= size.get("rope", {})
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = size.get("tied", False)
    _change(processor.image_processor, size["images"])
    _change(processor, size.get("processor", {}))
    config.save_pretrained(path)
    processor.save_pretrained(path)
    return Path(path)


def _change(target: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        setattr(target, key, value)
