"""The way of a sample through a model in shapes, and the norms of its vision features laid out as the patches lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_dist.checking.heat import Heat, drawn_over
from vlm_dist.config_load import parse_config
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoded, Encoder
from vlm_dist.data.view import _tiles, feature_maps, patch_size
from vlm_dist.inputs.opened import inputs_apart
from vlm_dist.models.load import load_model, read_model_config
from vlm_dist.models.processor import load_processor
from vlm_dist.planning.flow import ORDER, data_flow

UNKNOWN_LAYOUT = ("gemma4",)  # patches without a grid
TWO_AXES_MORE = ("mllama",)  # a tower that keeps pictures and tiles apart


def config_of(name: str):
    return parse_config("{name: x, model: {dtype: float32}, data: {train: x}, training: {steps: 1}}", [f"model.name={name}"])


def encode(processor, *pictures) -> Encoded:
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": "Hi there"}]
    return Encoder(processor, 100_000).encode_prompt([{"role": "user", "content": content}], list(pictures))


def test_stages_are_those_of_the_model_with_data(any_checkpoint):
    config = config_of(any_checkpoint)
    hf_config, family = read_model_config(config.model, any_checkpoint)
    model, processor, _ = load_model(config.model, any_checkpoint, torch.device("cpu"))
    batch = collate([encode(processor, Image.new("RGB", (64, 48), "red"))], processor.tokenizer.pad_token_id)
    stages = data_flow(config, hf_config, family, batch)
    assert [stage.name for stage in stages if stage.name in ORDER] == [stage.name for stage in stages]
    by_name = {stage.name: stage for stage in stages}
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        assert by_name["logits"].shape == tuple(model(**inputs, use_cache=False).logits.shape)
    length = batch["input_ids"].shape[1]
    assert by_name["text embeddings"].shape[:2] == (1, length) and by_name["vision tower"].module == family.vision
    assert by_name["projector"].shape[-1] == by_name["text embeddings"].shape[-1]


@pytest.mark.parametrize("family", ["llava", "llava_next", "pixtral", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl"])
def test_maps_lie_as_the_patches_do(checkpoint, family):
    """With each patch's own pixels for its feature, the map is the picture itself in patches."""
    processor = load_processor(config_of(checkpoint(family)).model, checkpoint(family))
    noise = np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8)
    encoded = encode(processor, Image.fromarray(noise))
    tiles = _tiles(encoded.inputs, processor.image_processor)
    side = patch_size(processor) or 16
    expected = [tile.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(2).norm(dim=-1) for tile in tiles]
    if "image_grid_thw" in encoded.inputs:
        features = encoded.inputs["pixel_values"] / encoded.inputs["pixel_values"].shape[1] ** 0.5
        expected = [one / (3 * side * side) ** 0.5 for one in expected]  # a patch holds each frame twice
    else:
        rows = [tile.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1) for tile in tiles]
        features = torch.stack([torch.cat([torch.zeros(1, row.shape[1]), row]) for row in rows])
    found = feature_maps(features, encoded, processor)
    assert len(found) == len(expected) and found[0].numel() > 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_heat_of_every_family(any_checkpoint):
    with inputs_apart(config_of(any_checkpoint)) as inputs:
        heat = Heat(inputs)
    encoded = encode(heat.processor, Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 32), "blue"))
    maps = heat.maps(encoded)
    name = heat.model.config.model_type
    if name in UNKNOWN_LAYOUT + TWO_AXES_MORE:
        assert maps == []
        return
    assert len(maps) >= 2 and all(one.ndim == 2 and (one > 0).all() for one in maps)


def test_drawn():
    norms = torch.zeros(2, 3)
    norms[1, 2] = 5.0
    picture = drawn_over(Image.new("RGB", (60, 40), "white"), norms)
    assert picture.size == (60, 40)
    brightest = max(((x, y) for x in (10, 30, 50) for y in (10, 30)), key=lambda place: sum(picture.getpixel(place)[:2]))
    assert brightest == (50, 30)
