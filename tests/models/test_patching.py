"""A patched model is the same model: loss and every gradient, with every kernel that fits; and all of it can be taken back."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch
from PIL import Image

from tests.models.test_families import SAMPLES, TEXT_ONLY, batch
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.errors import ConfigError
from vlm_dist.models.generate import generate
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.patches import Patches
from vlm_dist.models.patching import patch_model
from vlm_dist.models.patching_vision import attend_in_windows, patch_patch_embedding

CPU = torch.device("cpu")


def samples():
    """The family suite's, with textured pictures: on flat ones attention in the vision tower has no gradient but rounding."""
    generator = numpy.random.default_rng(0)

    def textured(image):
        return Image.fromarray(generator.integers(0, 255, (image.height, image.width, 3), dtype=numpy.uint8))

    return [dataclasses.replace(sample, images=[textured(image) for image in sample.images]) for sample in [*SAMPLES, TEXT_ONLY]]


def trainable(checkpoint: str, **options):
    lora = LoraConfig(r=8, **options)
    model, processor, family = load_model(ModelConfig(name=checkpoint), checkpoint, CPU, lora=lora)
    torch.manual_seed(0)
    model = add_lora(model, family, lora).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, Encoder(processor, 1024)


def loss_and_gradients(model, data):
    model.zero_grad()
    torch.manual_seed(1)
    loss = summed_loss(model, data)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max()
        assert (found[1][name] - gradient).abs().max() <= 1e-4 * scale + 1e-6, name


ALL = {
    "layer_norm",
    "linear_cross_entropy",
    "mlp",
    "nf4_lora_linear",
    "patch_embedding",
    "picture_places",
    "rms_norm",
    "rope",
    "supervised_rows",
    "vision_windows",
}
LACKING = {  # what a family has no module for, or none that the kernel fits
    "gemma4": {"layer_norm", "picture_places", "rope"},
    "gemma4_moe": {"layer_norm", "picture_places", "rope"},
    "glm4v": {"picture_places"},
    "glm4v_moe": {"picture_places"},
    "idefics3": {"picture_places"},
    "mini_vlm": {"picture_places"},
    "mllama": {"picture_places"},
    "mistral3": {"layer_norm"},
    "pixtral": {"layer_norm"},
    "qwen2_5_vl": {"layer_norm"},
    "qwen3_vl_moe": {"mlp"},
}


def test_every_kernel_on_every_family(any_checkpoint):
    model, encoder = trainable(any_checkpoint)
    data = batch(encoder, samples())
    expected = loss_and_gradients(model, data)
    patches = patch_model(model, "all")
    name = any_checkpoint.rsplit("/", 1)[1]
    windows = set() if name.startswith(("qwen", "glm")) else {"vision_windows", "patch_embedding"}
    assert set(patches.counts) == ALL - LACKING.get(name, set()) - windows, str(patches)
    assert_same(loss_and_gradients(model, data), expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(loss_and_gradients(model, data), expected)
    model.gradient_checkpointing_disable()
    assert [name for name, module in model.named_modules() if "forward" in vars(module)]
    patches.restore()
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert_same(loss_and_gradients(model, data), expected)


@pytest.mark.parametrize("kernel", sorted(ALL))
def test_each_alone(qwen, llava, kernel):
    checkpoint = llava if kernel == "layer_norm" else qwen
    model, encoder = trainable(checkpoint)
    data = batch(encoder, samples())
    expected = loss_and_gradients(model, data)
    names = ["linear_cross_entropy", kernel] if kernel == "supervised_rows" else [kernel]
    assert set(patch_model(model, names).counts) == set(names)
    assert_same(loss_and_gradients(model, data), expected)


def test_the_other_calls_of_a_patched_model(qwen):
    """Logits, generation, a switched-off adapter and evaluation mode."""
    model, encoder = trainable(qwen)
    prompt = collate(
        [encoder.encode_prompt(samples()[0].messages[:1], samples()[0].images)], encoder.processor.tokenizer.pad_token_id, "left"
    )
    inputs = {name: tensor for name, tensor in prompt.items() if name != "labels"}

    def observe():
        with torch.no_grad():
            trained = model.eval()(**inputs).logits
            with model.disable_adapter():
                plain = model(**inputs).logits
        return trained, plain, generate(model, encoder.processor, prompt, 6)

    before = observe()
    patch_model(model, "all")
    loss_and_gradients(model.train(), batch(encoder, samples()))  # leaves its rows behind
    after = observe()
    torch.testing.assert_close(after[:2], before[:2], rtol=1e-4, atol=1e-4)
    assert after[2] == before[2] and (before[0] - before[1]).abs().max() > 0.01


def test_dropout_and_trained_heads(llava):
    """Another draw of the mask, but gradients everywhere; a head that trains whole gets its own."""
    model, encoder = trainable(llava, dropout=0.3, modules_to_save=["lm_head"], projector="full")
    data = batch(encoder, samples())
    plain = loss_and_gradients(model.eval(), data)
    patches = patch_model(model, "all")
    assert_same(loss_and_gradients(model, data), plain)
    assert any("lm_head" in name for name in plain[1])
    first, second = loss_and_gradients(model.train(), data), loss_and_gradients(model, data)
    assert first[0] == second[0] and first[0] != plain[0]  # one seed, one mask
    assert all(gradient.any() for gradient in first[1].values()) and patches.counts["nf4_lora_linear"]


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("whole", [[], ["lm_head"]])
def test_in_bfloat16(qwen, load_in_4bit, whole):
    """As on a GPU: a bfloat16 base, adapters in float32, computed under autocast. Every kernel fits, with dropout too, and the losses
    agree within bfloat16's rounding."""
    lora = LoraConfig(r=8, dropout=0.1, modules_to_save=whole)
    config = ModelConfig(name=qwen, dtype="bfloat16", load_in_4bit=load_in_4bit)
    model, processor, family = load_model(config, qwen, CPU, lora=lora)
    model = add_lora(model, family, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            torch.nn.init.normal_(parameter, std=0.05)
    modes = {name: module.training for name, module in model.named_modules()}
    data = batch(Encoder(processor, 1024), samples())
    losses = []
    for kernels in ("off", "all"):
        patches = patch_model(model, kernels)
        assert {name: module.training for name, module in model.named_modules()} == modes
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(summed_loss(model, data))
        for name, module in model.named_modules():
            module.training = modes[name]
    expected = ALL - LACKING["qwen2_5_vl"] - (set() if load_in_4bit else {"nf4_lora_linear"})
    assert set(patches.counts) == expected, str(patches)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
    losses[1].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_dora_keeps_its_own_code(llava):
    model, encoder = trainable(llava, dora=True)
    data = batch(encoder, samples())
    expected = loss_and_gradients(model, data)
    patches = patch_model(model, "all")
    assert "nf4_lora_linear" not in patches.counts and "DoRA" in patches.kept["nf4_lora_linear"]
    assert_same(loss_and_gradients(model, data), expected)


def test_on_a_cpu_auto_takes_what_helps(llava):
    model, _ = trainable(llava)
    assert set(patch_model(model).counts) == {"linear_cross_entropy", "supervised_rows"}
    model, _ = trainable(llava)
    assert not patch_model(model, "off").counts and not getattr(model, "gives_summed_loss", False)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 6, 4, 2, 6], [7], [3, 0, 3]])
def test_windows_are_attended_to_one_by_one(lengths):
    """All windows of a length at once, against a mask that lets each patch see its own window."""
    states = torch.randn((3, 1, 2, sum(lengths), 8), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    found, _ = attend_in_windows(None, *states, cu_seq_lens_q=ends, scaling=0.3)
    window = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=window[:, None] == window, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_embedded_by_a_product(dtype):
    """The numbers and gradients of the convolution; one whose patches overlap stays, and so does an input of another size."""
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(3, 64, (2, 14, 14), (2, 14, 14), bias=False, dtype=dtype)
    x = torch.randn(20, 3, 2, 14, 14, dtype=dtype)
    expected = conv(x)
    expected.float().square().sum().backward()
    gradient, conv.weight.grad = conv.weight.grad, None
    holder = torch.nn.ModuleList([conv, torch.nn.Conv3d(3, 8, (2, 4, 4), (2, 2, 2))])
    patches = Patches()
    patch_patch_embedding(holder, patches)
    assert patches.counts["patch_embedding"] == 1 and "overlap" in patches.kept["patch_embedding"]
    y = conv(x)
    y.float().square().sum().backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, expected, **tolerance)
    assert (conv.weight.grad - gradient).norm() <= tolerance["rtol"] * gradient.norm()
    assert conv(torch.zeros(1, 3, 4, 28, 28, dtype=dtype)).shape == (1, 64, 2, 2, 2)


def test_a_kernel_that_fits_nothing_is_refused(qwen):
    model, _ = trainable(qwen)
    with pytest.raises(ConfigError, match=r"kernels: layer_norm fits nothing in this model \(no such module\); leave it out"):
        patch_model(model, ["layer_norm"])


def test_nothing_is_saved_where_nothing_trains(llava):
    """Adapters in the last language layer alone: the vision tower and the layers below keep nothing for a backward pass."""
    model, encoder = trainable(llava, vision=False, layers={"language": [-1]})
    patch_model(model, "all")
    base = model.get_base_model().model
    saved: list[torch.Tensor] = []
    marks: dict[str, list[int]] = {}
    parts = {"vision": base.vision_tower, "first": base.language_model.layers[0], "last": base.language_model.layers[-1]}
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: marks.setdefault(name, []).append(len(saved)))
        part.register_forward_hook(lambda *_, name=name: marks[name].append(len(saved)))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = summed_loss(model, batch(encoder, samples()))
    loss.backward()
    kept = {name: after - before for name, (before, after) in marks.items()}
    assert kept["vision"] == kept["first"] == 0 and kept["last"] > 0, kept


@pytest.mark.slow
def test_under_torch_compile(llava):
    model, encoder = trainable(llava)
    data = batch(encoder, samples())
    expected = loss_and_gradients(model, data)
    patch_model(model, "all")
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    inputs = {name: tensor for name, tensor in data.items() if name != "labels"}
    loss = compiled(**inputs, loss_labels=data["labels"], use_cache=False).loss
    loss.backward()
    assert_same((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}), expected)


def test_no_label_trains_nothing(llava):
    """A blank row alone: zero loss, and a zero gradient for every trainable weight, so that ranks stay in step."""
    model, encoder = trainable(llava)
    patch_model(model, "all")
    data = collate([encoder.encode_prompt(samples()[0].messages[:1], samples()[0].images)], 0)
    loss, gradients = loss_and_gradients(model, data)
    assert loss == 0 and len(gradients) == sum(p.requires_grad for p in model.parameters())
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.slow
def test_every_weight_trained_beside_a_frozen_side_at_zero_stage_3(settings, tmp_path):
    """Weights that train are in float32 when the kernels are put in, those of the frozen side in 16 bit."""
    from tests.conftest import losses_of, write_config
    from vlm_dist import load_config, train

    settings["model"] |= {"load_in_4bit": False, "dtype": "bfloat16", "freeze": ["vision"]}
    config = str(write_config({**settings, "lora": None, "training": {"steps": 2, "global_batch": 4, "micro_batch": 2}}, tmp_path))
    found = []
    for stage in (2, 3):
        train(load_config(config, [f"engine.zero_stage={stage}", "kernels=[mlp]", f"name=stage-{stage}"]))
        found.append(losses_of(tmp_path / "runs" / f"stage-{stage}"))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.slow
def test_training_at_zero_stage_3(settings, tmp_path):
    """The same losses with all kernels and with none, on real engines; weights are gathered where they are used, in `generate` too."""
    from tests.conftest import losses_of, run_command, write_config

    config = str(write_config({**settings, "training": {"steps": 5, "global_batch": 4, "micro_batch": 2}}, tmp_path))
    found = []
    for kernels in ("off", "all"):
        folder = tmp_path / f"runs-{len(found)}"
        options = [f"kernels={kernels}", "engine.zero_stage=3", f"output_dir={folder}"]
        result = run_command("train", config, *options)
        assert result.returncode == 0, result.stderr
        assert ("20 x nf4_lora_linear" in result.stdout) == (kernels != "off")
        found.append(losses_of(folder / "tiny"))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
