"""Experts: packed to the byte, computed as a loop over unpacked ones does, adapted as PEFT does, merged from whatever a base holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from tests.models.test_families import SAMPLES, batch
from tests.models.test_merge import load_merged, logits, trained
from vlm_dist.config import LoraConfig, ModelConfig
from vlm_dist.data.encode import Encoder
from vlm_dist.errors import ModelError
from vlm_dist.models import merge
from vlm_dist.models.experts import expert_modules, expert_weights, routers
from vlm_dist.models.experts_lora import experts_in_words
from vlm_dist.models.held import without_adapter
from vlm_dist.models.load import load_model
from vlm_dist.models.lora import add_lora, count_trainable
from vlm_dist.models.loss import summed_loss
from vlm_dist.models.merge import merge_16bit
from vlm_dist.testing.qwen import QWEN3_PIXELS, QWEN3_ROPE, QWEN3_VISION, qwen

CPU = torch.device("cpu")
EXPERTS = 8


@pytest.fixture
def sparse(checkpoint) -> str:
    return checkpoint("qwen3_vl_moe")


def load(name: str, **options):
    return load_model(ModelConfig(name=name, **options), name, CPU)


def whole_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def plain_model(packed, name: str):
    """transformers' own model of the numbers that are packed in `packed`, its experts in transformers' own loop."""
    from transformers import AutoModelForImageTextToText

    plain = AutoModelForImageTextToText.from_pretrained(name, experts_implementation="eager")
    with torch.no_grad():
        for path, weight in packed.named_parameters():
            if (state := getattr(weight, "quant_state", None)) is not None:
                plain.get_parameter(whole_name(path)).copy_(functional.dequantize_4bit(weight.data, state))
    return plain


def routed(case: str, tokens: int, top_k: int) -> torch.Tensor:
    if case == "all to one":
        return torch.arange(top_k).expand(tokens, top_k).contiguous()
    if case == "even":
        return (torch.arange(tokens)[:, None] + torch.arange(top_k)) % EXPERTS
    generator = torch.Generator().manual_seed(0)
    return torch.rand((tokens, EXPERTS - (top_k < EXPERTS)), generator=generator).topk(top_k).indices  # the last gets none


def test_packed_to_the_byte_as_bitsandbytes_packs_the_whole(sparse):
    model, _, _ = load(sparse)
    plain, _, _ = load(sparse, load_in_4bit=False)
    numbers = size = 0
    for name, weight in expert_weights(model).items():
        codes, state = functional.quantize_4bit(plain.get_parameter(name).detach(), compress_statistics=True, quant_type="nf4")
        ours = weight.quant_state
        assert torch.equal(functional.dequantize_4bit(weight.data, ours), functional.dequantize_4bit(codes, state))
        assert weight.dtype == torch.float32 and not weight.requires_grad  # a type that ZeRO-3 can shard
        size += weight.nbytes + ours.absmax.nbytes + ours.state2.absmax.nbytes
        numbers += ours.shape.numel()
    assert numbers == 294_912
    assert 8 * size == 4.126953125 * numbers


@pytest.mark.parametrize("case", ["all to one", "even", "one gets none"])
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_plain_loop_over_unpacked_experts_gives_the_same(sparse, case, top_k, checkpointed):
    """The sum, and the gradients of tokens, routing weights and adapters; nothing unpacked is kept."""
    model, _, family = load(sparse)
    model = add_lora(model, family, LoraConfig(r=4))
    wrapper = model.base_model.model.model.language_model.layers[0].mlp.experts
    weights = {name: functional.dequantize_4bit(w.data, w.quant_state) for name, w in expert_weights(wrapper).items()}
    torch.manual_seed(0)
    deltas = {}
    for name, [(a, b, scaling)] in wrapper.factors().items():
        torch.nn.init.normal_(b, std=0.1)
        deltas[name] = scaling * torch.einsum("ore,eri->eoi", b.view(len(b), -1, EXPERTS), a.view(EXPERTS, -1, a.shape[-1]))
    adapters = [p for p in wrapper.parameters() if p.requires_grad]
    gate_up, down = (next(w for n, w in weights.items() if n.endswith(name)) + deltas[name] for name in ("gate_up_proj", "down_proj"))

    def loop(x, chosen, shares):
        rows = []
        for token, (experts, its_shares) in enumerate(zip(chosen.tolist(), shares, strict=True)):
            outputs = []
            for expert, share in zip(experts, its_shares, strict=True):
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                outputs.append(share * (down[expert] @ (torch.nn.functional.silu(gate) * up)))
            rows.append(torch.stack(outputs).sum(0))
        return torch.stack(rows)

    def ours(x, chosen, shares):
        if checkpointed:
            return torch.utils.checkpoint.checkpoint(wrapper, x, chosen, shares, use_reentrant=False)
        return wrapper(x, chosen, shares)

    tokens, chosen = 16, routed(case, 16, top_k)
    found, kept = [], []
    for function in (ours, loop):
        x, shares = torch.randn((tokens, 64), generator=torch.Generator().manual_seed(1)).requires_grad_(), torch.full((tokens, top_k), 0.3)
        shares.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
            y = function(x, chosen, shares)
        if function is ours:
            assert not [shape for shape in kept if len(shape) == 3], "something unpacked is kept"
        gradients = torch.autograd.grad((y * torch.linspace(-1, 1, 64)).sum(), [x, shares, *adapters])
        found.append([y.detach(), *gradients])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_plain_peft_on_plain_weights_gives_the_same_loss_and_gradients(sparse, tmp_path):
    """What is saved is PEFT's own `target_parameters`, of its own rank and scale; PEFT computes the same from it."""
    from peft import PeftModel

    model, processor, family = load(sparse)
    model = add_lora(model, family, LoraConfig(r=8, r_experts=2, alpha_language=16)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert set(saved["rank_pattern"].values()) == {2} and set(saved["alpha_pattern"].values()) == {4.0, 16.0}
    plain = PeftModel.from_pretrained(plain_model(model, sparse), str(tmp_path), is_trainable=True).train()
    assert type(plain.base_model.model.model.language_model.layers[0].mlp.experts).__module__.startswith("peft.")
    data = batch(Encoder(processor, 1024), SAMPLES)
    losses = [summed_loss(one, data) for one in (model, plain)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and any(".experts." in name for name in found)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6, name


def test_switches(sparse, llava):
    def counted(name: str, model_options: dict | None = None, **options):
        config = LoraConfig(r=4, **options)
        model, _, family = load_model(ModelConfig(name=name, **(model_options or {})), name, CPU, lora=config)
        return add_lora(model, family, config), family

    def adapted(model) -> bool:
        return any(".experts." in name and parameter.requires_grad for name, parameter in model.named_parameters())

    assert adapted(counted(sparse)[0]) and adapted(counted(sparse, experts="lora", mlp=False)[0])
    for options in ({"experts": "off"}, {"mlp": False}, {"dropout": 0.1}, {"language": False}, {"modules": ["q_proj"]}, {"dora": True}):
        assert not adapted(counted(sparse, **options)[0]), options
    model, family = counted(sparse, layers={"language": [-1]}, vision=False)
    of_experts = [name for name, p in model.named_parameters() if ".experts." in name and p.requires_grad]
    assert of_experts and all(".layers.2." in name for name in of_experts)
    model, family = counted(sparse, router="full", experts="off", attention=False, vision=False)
    trained_routers = [whole_name(name) for name, p in model.named_parameters() if ".gate." in name and p.requires_grad]
    assert len(trained_routers) == len(routers(load(sparse)[0])) == 3
    assert count_trainable(model, family)["language"] >= 3 * EXPERTS * 64
    with pytest.raises(ModelError, match=r"lora.experts=lora: this model has no experts that are found; leave it out"):
        counted(llava, experts="lora")
    with pytest.raises(ModelError, match=r"lora.router=full: this model has no experts"):
        counted(llava, router="full")
    with pytest.raises(ValidationError, match=r"no dropout and no DoRA; set lora.dropout: 0, or lora.experts: off"):
        LoraConfig(experts="lora", dropout=0.1)


def test_experts_that_train_whole(sparse, tmp_path, monkeypatch):
    """Of lora.modules_to_save: without adapter, counted once, and merged, in the layout of the base's makers too."""
    monkeypatch.setattr(merge, "_sixteen_bit", lambda _: torch.float32)
    base = _base_in("exchanged", sparse, tmp_path / "base")
    config = LoraConfig(r=4, modules_to_save=["mlp.experts"])
    model, processor = trained(base, config, tmp_path / "adapter", load_in_4bit=True)
    assert "experts: 3 layers of 8; lora.experts=auto: off, by lora.modules_to_save;" in experts_in_words(model, config)
    assert not [name for name in without_adapter(model) if "expert" in name]
    merge_16bit(ModelConfig(name=base), tmp_path / "adapter", processor, tmp_path / "merged", "dequantised", torch.float32)
    torch.testing.assert_close(logits(load_merged(tmp_path / "merged"), processor), logits(model, processor), rtol=1e-4, atol=2e-4)
    with pytest.raises(ModelError, match=r"'mlp.experts' holds experts, which lora.experts=lora adapts; leave one of the two out"):
        add_lora(*load(sparse)[::2], LoraConfig(experts="lora", modules_to_save=["mlp.experts"]))


def test_what_is_kept_in_16_bit(sparse):
    from bitsandbytes.nn.modules import Linear4bit

    def packed(**options) -> set[str]:
        model, _, family = load(sparse, **options)
        linear = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
        experts = {name for name, weight in expert_weights(model).items() if hasattr(weight, "quant_state")}
        return {family.side_of(name) for name in linear} | {"experts" for _ in experts} | {name for name in linear if "q_proj" in name}

    assert packed() >= {"vision", "projector", "language", "experts"}
    assert packed(keep_16bit=["vision"]) & {"vision", "projector", "experts"} == {"experts"}  # its projector lies in it
    assert "experts" not in packed(keep_16bit=["mlp.experts"])
    assert not {name for name in packed(keep_16bit=[r"layers\.0"]) if "layers.0." in name}
    with pytest.raises(ModelError, match=r"model.keep_16bit: no module is called 'visoin'"):
        packed(keep_16bit=["visoin"])
    with pytest.raises(ValidationError, match="no regular expression"):
        ModelConfig(name=sparse, keep_16bit=["("])


def test_an_expert_that_is_no_multiple_of_a_block_is_refused(tmp_path):
    words = (
        r"'model.language_model.layers.0.mlp.experts.gate_up_proj' have \(14, 40\) weights each, no multiple of the 64 .* model.keep_16bit"
    )
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7, "hidden_size": 40}
    vision, sizes = {**QWEN3_VISION, "out_hidden_size": 40}, {"head_dim": 16, "num_hidden_layers": 3, **experts}
    processor, model = qwen("Qwen3VLMoe", vision, QWEN3_ROPE, QWEN3_PIXELS, "Qwen3VLVideoProcessor", processor="Qwen3VLProcessor", **sizes)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words):
        load(str(tmp_path))
    assert load(str(tmp_path), keep_16bit=["mlp.experts"])[0].is_loaded_in_4bit


def test_sizes_that_config_json_contradicts(sparse, tmp_path):
    shutil.copytree(sparse, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["moe_intermediate_size"] = 32
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"holds .*mlp\.experts\.\w+ in size .*its config\.json says"):
        load(str(tmp_path / "other"))


@pytest.mark.parametrize("onto", ["dequantised", "original"])
@pytest.mark.parametrize("form", ["as saved", "exchanged", "in several files"])
def test_merged_from_any_form_of_the_base(sparse, tmp_path, monkeypatch, onto, form):
    """The experts' last two dimensions exchanged are how Qwen3-VL's makers published it."""
    monkeypatch.setattr(merge, "_sixteen_bit", lambda _: torch.float32)
    base = _base_in(form, sparse, tmp_path / "base")
    model, processor = trained(base, LoraConfig(r=4), tmp_path / "adapter", load_in_4bit=onto == "dequantised")
    merge_16bit(ModelConfig(name=base), tmp_path / "adapter", processor, tmp_path / "merged", onto, torch.float32)
    torch.testing.assert_close(logits(load_merged(tmp_path / "merged"), processor), logits(model, processor), rtol=1e-4, atol=2e-4)
    stored = {name: tuple(tensor.shape) for file in Path(base).glob("*.safetensors") for name, tensor in load_file(file).items()}
    out = {name: tuple(tensor.shape) for file in (tmp_path / "merged").glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert out == stored


def _base_in(form: str, sparse: str, folder: Path) -> str:
    if form == "as saved":
        return sparse
    shutil.copytree(sparse, folder)
    weights = load_file(folder / "model.safetensors")
    if form == "exchanged":
        weights = {name: (t.transpose(1, 2) if "gate_up_proj" in name else t).contiguous() for name, t in weights.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return str(folder)
    (folder / "model.safetensors").unlink()
    halves = [{name: t for name, t in weights.items() if ("down_proj" in name) == is_down} for is_down in (True, False)]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name, {"format": "pt"})
    index = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return str(folder)


@pytest.fixture(params=["qwen3_vl_moe", "gemma4_moe", "glm4v_moe"])
def stored_in_4bit(request, checkpoint, tmp_path) -> tuple[str, str]:
    """A base, and the same with all that loading packs stored packed, by transformers' own `save_pretrained`."""
    base, folder = checkpoint(request.param), tmp_path / "packed"
    model, processor, _ = load(base, dtype="bfloat16")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return base, str(folder)


def test_experts_stored_in_4bit_are_read_back(stored_in_4bit, tmp_path, monkeypatch):
    """To the byte, in whichever number type; they are saved again, adapted, and merged; and are told where 16 bit is asked for."""
    base, folder = stored_in_4bit
    first, again = load(base, dtype="bfloat16")[0], load(folder, dtype="bfloat16")[0]
    weights = expert_weights(first)
    assert weights and weights.keys() == expert_weights(again).keys()
    for name, weight in expert_weights(again).items():
        assert torch.equal(weight.view(torch.uint8), weights[name].view(torch.uint8))
        assert weight.expected == weight.quant_state.shape == weights[name].quant_state.shape
        unpacked = [functional.dequantize_4bit(one.data, one.quant_state) for one in (weight, weights[name])]
        assert torch.equal(*unpacked)
    again.save_pretrained(tmp_path / "twice")
    stored = [load_file(Path(one) / "model.safetensors") for one in (folder, tmp_path / "twice")]
    assert stored[0].keys() == stored[1].keys() and all(
        torch.equal(tensor.view(torch.uint8), stored[1][name].view(torch.uint8)) for name, tensor in stored[0].items()
    )
    fine = load(folder)[0]
    assert {weight.dtype for weight in expert_weights(fine).values()} == {torch.float32}

    monkeypatch.setattr(merge, "_sixteen_bit", lambda _: torch.float32)
    model, processor = trained(folder, LoraConfig(r=4), tmp_path / "adapter", load_in_4bit=True)
    merge_16bit(ModelConfig(name=folder), tmp_path / "adapter", processor, tmp_path / "merged", "dequantised", torch.float32)
    torch.testing.assert_close(logits(load_merged(tmp_path / "merged"), processor), logits(model, processor), rtol=1e-4, atol=2e-4)
    for pattern in ("experts", "vision"):
        with pytest.raises(ModelError, match=rf"model.keep_16bit: '{pattern}' is in 4 bit in this checkpoint \(model\..*\), and"):
            load(folder, keep_16bit=[pattern])
    with pytest.raises(ModelError, match=r"model.load_in_4bit=false: '.*' is quantised \(bitsandbytes, 4 bit\)"):
        load(folder, load_in_4bit=False)


def test_experts_that_were_packed_one_by_one_are_refused(sparse, tmp_path):
    model, processor, _ = load(sparse)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.language_model.layers.0.mlp.experts.0.down_proj.weight"
    weights |= {name: torch.zeros((8, 1), dtype=torch.uint8), f"{name}.absmax": torch.zeros(1)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"holds each expert by itself in 4 bit \('.*experts.0.down_proj.weight'\).*give the 16-bit"):
        load(str(tmp_path))


def test_every_weight_trains_without_adapters(sparse):
    """Full training of the experts: gradients are those of transformers' own loop."""
    from transformers import AutoModelForImageTextToText

    model, processor, _ = load(sparse, load_in_4bit=False)
    plain = AutoModelForImageTextToText.from_pretrained(sparse, experts_implementation="eager")
    assert len(expert_modules(model)) == 3
    data = batch(Encoder(processor, 1024), SAMPLES)
    for one in (model, plain):
        summed_loss(one.train(), data).backward()
    for name, weight in expert_weights(plain).items():
        found = model.get_parameter(name).grad
        assert (found - weight.grad).abs().max() <= 1e-5 * weight.grad.abs().max()
