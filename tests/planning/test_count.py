"""What is counted without data, against the same models with data: bytes kept, bytes at the fullest moment, weights, moments, FLOPs."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vlm_dist.config_load import parse_config
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.families import FAMILIES
from vlm_dist.models import offloading
from vlm_dist.models.checkpointing import checkpoint_gradients
from vlm_dist.models.load import load_model, read_model_config
from vlm_dist.models.lora import add_lora, freeze_sides
from vlm_dist.models.loss import IGNORED, summed_loss
from vlm_dist.models.patching import patch_model
from vlm_dist.models.processor import load_processor
from vlm_dist.planning.count import Counted, count_micro_batch, quant_state_bytes
from vlm_dist.planning.memory import CONTEXT, loading_of, memory_of, optimizer_bytes
from vlm_dist.planning.shapes import Tally

pytestmark = pytest.mark.slow


def config_of(name: str, **settings):
    text = "{name: x, model: {name: '%s', dtype: float32, gradient_checkpointing: %s}, data: {train: x}, training: {steps: 1}}"
    return parse_config(text % (name, settings.pop("checkpointing", "false")), [f"{key}={value}" for key, value in settings.items()])


def batch_of(processor) -> dict:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many shapes are there? " * 60}]}
    encoded = Encoder(processor, 100_000).encode_prompt([message], [Image.new("RGB", (64, 64), "red")])
    batch = collate([encoded], processor.tokenizer.pad_token_id)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, : int(0.9 * batch["labels"].shape[1])] = IGNORED
    return batch


def real_model(config):
    model, processor, family = load_model(config.model, config.model.name, torch.device("cpu"), lora=config.lora)
    if config.lora is None:
        freeze_sides(model, family, config.model.freeze)
    else:
        model = add_lora(model, family, config.lora)
    checkpoint_gradients(model, family, config.model.gradient_checkpointing)
    patch_model(model, config.kernels)
    return model.train(), processor


def stored(model) -> set[torch.Tensor]:
    """All tensors that a model holds, the scales of its 4-bit weights too."""
    found = {*model.parameters(), *model.buffers()}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found |= {state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code}
    return found


def measure(model, batch: dict) -> tuple[int, int]:
    """(bytes kept by the forward pass, most bytes at any moment) beside weights and batch, of tensors with data."""
    with Tally() as tally:
        for tensor in [*stored(model), *batch.values()]:
            tally.hold(tensor)
        tally.count.mark()
        before = tally.count.live
        loss = summed_loss(model, batch)
        kept = tally.count.live - before
        torch.autograd.backward(loss)
        return kept, tally.count.peak - before


def check_weights(counted, model) -> None:
    """To the byte, 4-bit scales too."""
    parameters = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    states = [tensor.quant_state for tensor in parameters if getattr(tensor, "quant_state", None) is not None]
    assert sum(counted.weights.values()) == sum(t.numel() * t.element_size() for t in parameters) + sum(map(quant_state_bytes, states))
    assert counted.weights["statistics"] == sum(map(quant_state_bytes, states))
    assert sorted(counted.trainable) == sorted(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_bytes_kept_and_at_the_fullest_moment(any_checkpoint, checkpointing):
    config = config_of(any_checkpoint, checkpointing=checkpointing)
    model, processor = real_model(config)
    batch = batch_of(processor)
    kept, peak = measure(model, batch)
    counted = count_micro_batch(config, *read_model_config(config.model, any_checkpoint), torch.float32, batch, on_gpu=False)
    assert counted.saved == pytest.approx(kept, rel=0.02)
    assert counted.peak == pytest.approx(peak, rel=0.02)
    check_weights(counted, model)
    assert 0 < counted.saved_vision < counted.saved and 0 < counted.vision_flops < counted.forward_flops


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "mllama"])
def test_every_weight_trained(checkpoint, family):
    config = config_of(checkpoint(family), **{"lora": "null", "model.load_in_4bit": "false"})
    model, processor = real_model(config)
    batch = batch_of(processor)
    kept, peak = measure(model, batch)
    counted = count_micro_batch(config, *read_model_config(config.model, config.model.name), torch.float32, batch, on_gpu=False)
    assert (counted.saved, counted.peak) == (pytest.approx(kept, rel=0.02), pytest.approx(peak, rel=0.02))
    assert sum(counted.trainable) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # two products for each of the forward pass; attention five for two, because it makes its scores again
    assert 1.9 * counted.forward_flops < counted.backward_flops < 2.5 * counted.forward_flops


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
def test_bytes_that_autograd_saves(checkpoint, family):
    """The same by torch's own hooks, which see every tensor that is kept for the backward pass."""
    config = config_of(checkpoint(family))
    model, processor = real_model(config)
    batch = batch_of(processor)
    known = {tensor.untyped_storage().data_ptr() for tensor in [*stored(model), *batch.values()]}
    seen: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_loss(model, batch)
    counted = count_micro_batch(config, *read_model_config(config.model, config.model.name), torch.float32, batch, on_gpu=False)
    assert counted.saved == pytest.approx(sum(seen.values()), rel=0.05)


@pytest.mark.parametrize("changes", [{"lora.projector": "full"}, {"lora.modules_to_save": "[lm_head]"}, {"model.load_in_4bit": "false"}])
def test_weights_to_the_byte(any_checkpoint, changes):
    row = FAMILIES[read_model_config(config_of(any_checkpoint).model, any_checkpoint)[1].model_type]
    config = config_of(any_checkpoint, **changes)
    hf_config, _ = read_model_config(config.model, any_checkpoint)
    if "lora.modules_to_save" in changes and (row.head != "lm_head" or getattr(hf_config, "tie_word_embeddings", False)):
        pytest.skip(f"the head of {row.model_type} is called otherwise or shared with the embedding, and does not train alone")
    model, processor = real_model(config)
    counted = count_micro_batch(config, hf_config, row, torch.float32, batch_of(processor), on_gpu=False)
    check_weights(counted, model)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_moments_to_the_byte(name):
    from bitsandbytes.optim.adamw import AdamW8bit

    sizes = [(3,), (64, 64), (100, 77), (4095,), (4096,)]
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = torch.optim.AdamW(parameters) if name == "adamw" else AdamW8bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
    found = [value for state in optimizer.state.values() for key, value in state.items() if key in kept]
    assert optimizer_bytes([p.numel() for p in parameters], name) == sum(t.numel() * t.element_size() for t in found)


def test_flops_of_a_frozen_base(llava):
    """Forward 2 N a token; backward the same again where only adapters train (4 N in all), and 6 N with all of it recomputed."""
    plain, recomputed = (config_of(llava, checkpointing=mode, kernels="off") for mode in ("false", "true"))
    processor = load_processor(plain.model, llava)
    batch = batch_of(processor)
    hf_config, family = read_model_config(plain.model, llava)
    one = count_micro_batch(plain, hf_config, family, torch.float32, batch, on_gpu=False)
    other = count_micro_batch(recomputed, hf_config, family, torch.float32, batch, on_gpu=False)
    text = hf_config.text_config
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size  # at most: fewer key and value heads
    tokens = batch["input_ids"].numel()
    assert one.forward_flops < 2 * tokens * (text.num_hidden_layers * layer + text.vocab_size * text.hidden_size) * 3
    assert one.backward_flops == pytest.approx(1.5 * one.forward_flops, rel=0.35)  # adapters, small as the model is, count
    assert other.forward_flops == one.forward_flops
    assert other.backward_flops - one.backward_flops == pytest.approx(one.forward_flops, rel=0.25)  # all but head and projector again


def test_more_is_kept_without_our_kernels(qwen):
    """On a GPU, in bfloat16: what docs/kernels.md says the kernels save, seen by the plan."""
    found = {}
    for kernels in ("off", "all"):
        config = config_of(qwen, kernels=kernels)
        batch = batch_of(load_processor(config.model, qwen))
        found[kernels] = count_micro_batch(config, *read_model_config(config.model, qwen), torch.bfloat16, batch)
    assert found["all"].saved < 0.75 * found["off"].saved
    assert found["all"].weights == found["off"].weights


def test_what_zero_shards():
    counted = Counted(trainable=[1000, 24], saved=5000, peak=20_000, largest_layer=70)
    counted.weights.update({"4-bit": 800, "statistics": 40, "16-bit": 400, "trainable": 4096})
    config = config_of("m")
    alone = memory_of(counted, config, 0, 1).parts
    assert alone["optimizer"] == 8192 and alone["gradients"] == 4096 and "float32 copies" not in alone
    two = memory_of(counted, config, 2, 4).parts
    assert (two["optimizer"], two["float32 copies"], two["gradients"], two["base in 4 bit"]) == (2048, 1024, 1024, 800)
    three = memory_of(counted, config, 3, 4).parts
    assert (three["base in 4 bit"], three["its scales"], three["one layer whole"]) == (200, 40, 70)
    offloaded = memory_of(counted, config_of("m", **{"engine.offload": "all", "engine.zero_stage": "3"}), 3, 4)
    assert "optimizer" not in offloaded.parts and offloaded.host == 2048 + 1024 + 200 + 100 + 1024


def test_what_loading_takes():
    """In shares at stage 3, whole elsewhere, and where DoRA begins with whole weights; and one weight as it is read."""
    counted = Counted(trainable=[1000], largest_loaded=600)
    counted.weights.update({"4-bit": 800, "statistics": 40, "16-bit": 400, "trainable": 4000})
    three = {"engine.zero_stage": "3"}
    assert loading_of(counted, config_of("m"), 4) == loading_of(counted, config_of("m", **three, **{"lora.dora": "true"}), 4) == 5840
    assert loading_of(counted, config_of("m", **three), 4) == 40 + 5200 // 4 + 600
    assert loading_of(counted, config_of("m", **three, **{"engine.offload": "all"}), 4) == 40 + 600
    assert memory_of(counted, config_of("m", **three), 3, 4).loading == 40 + 5200 // 4 + 600 + CONTEXT


def test_inputs_in_host_memory_are_not_counted(llava, monkeypatch):
    """Each layer keeps its input [1, T, H] otherwise. (The last language layer is not recomputed, and needs but a few rows.)"""
    monkeypatch.setattr(offloading, "LEAST_BYTES", 1)
    batch = batch_of(load_processor(config_of(llava).model, llava))
    kept, peaks = [], []
    for wanted in ("true", "offload"):
        config = config_of(llava, checkpointing=wanted)
        counted = count_micro_batch(config, *read_model_config(config.model, llava), torch.float32, batch)
        kept.append(sum(counted.kept.values()))
        peaks.append(counted.peak)
    tokens, width = batch["input_ids"].shape[1], read_model_config(config.model, llava)[0].text_config.hidden_size
    assert kept[0] - kept[1] > 4 * tokens * width  # the first language layer's in float32, and the vision tower's
    assert peaks[1] < peaks[0]
