"""`model.name: ADAPTER`: a second training begins where the first one ended."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import losses_of, write_config
from tests.models.test_adapters import of_peft
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.config import LoraConfig
from vlm_dist.errors import ConfigError, ModelError
from vlm_dist.families import FAMILIES
from vlm_dist.models.going_on import lora_of, settle
from vlm_dist.models.record import read_record
from vlm_dist.models.trained import load_trained

CPU = torch.device("cpu")
STEPS = 3
pytestmark = pytest.mark.slow
REORDERED = 1e-6  # a mean over 4 samples in float32, added in another order: 4 roundings of 6e-8 each, and as many in the rest


@pytest.fixture(scope="module")
def four(tmp_path_factory, shards) -> str:
    """A shard of four samples: with a global batch of four, every step holds the same."""
    out = tmp_path_factory.mktemp("four") / "four.tar"
    with tarfile.open(shards["qa-train"][0]) as source, tarfile.open(out, "w") as target:
        keys: dict[str, None] = {}
        for member in source:
            keys[member.name.split(".")[0]] = None
            if len(keys) > 4:
                break
            target.addfile(member, source.extractfile(member))
    return str(out)


def first_settings(folder: Path, base: str, four: str) -> dict:
    return {
        "name": "first", "output_dir": str(folder / "runs"), "model": {"name": base},
        "lora": {"r": 4, "r_vision": 2, "projector": "full"}, "data": {"train": four, "max_seq_length": 256},
        "optim": {"lr": 1e-2, "schedule": "constant", "warmup_steps": 0},
        "training": {"steps": STEPS, "global_batch": 4, "micro_batch": 1}, "checkpoint": {"save_every": 0}, "log": {"wandb": "disabled"},
    }  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory, llava, four) -> Path:
    """The directory of a finished first run."""
    folder = tmp_path_factory.mktemp("first")
    train(load_config(write_config(first_settings(folder, llava, four), folder)))
    return folder / "runs" / "first"


def second(first: Path, tmp_path: Path, llava: str, four: str, *overrides: str, source: str = "adapter", **changes) -> Path:
    """A run that goes on from the first one's adapter, in a directory of its own."""
    settings = first_settings(tmp_path, str(first / source), four) | {"name": "second", "lora": {}} | changes
    train(load_config(write_config(settings, tmp_path), overrides))
    return tmp_path / "runs" / "second"


def test_its_first_loss_is_the_first_runs_next(first, tmp_path, llava, four):
    """The first run, one step longer, has this loss at that step; at another ZeRO stage, and from the run directory too."""
    train(load_config(write_config(first_settings(tmp_path, llava, four), tmp_path), [f"training.steps={STEPS + 1}", "name=longer"]))
    longer = losses_of(tmp_path / "runs" / "longer")
    assert longer[:STEPS] == pytest.approx(losses_of(first), rel=REORDERED) and longer[-1] < 0.9 * longer[0]
    run = second(first, tmp_path, llava, four, "seed=7")
    assert losses_of(run)[0] == pytest.approx(longer[-1], rel=REORDERED)
    sharded = second(first, tmp_path, llava, four, "seed=7", "name=second3", "engine.zero_stage=3", source=".")
    assert losses_of(sharded.with_name("second3")) == pytest.approx(losses_of(run), rel=1e-4)  # as the parity tests have it


def test_the_second_run_is_a_run_like_any(first, tmp_path, llava, four, capsys, monkeypatch):
    """Its configuration says what its adapter is; it resumes from its own checkpoints; generate and export know the base of the first."""
    run = second(first, tmp_path, llava, four, "checkpoint.save_every=2")
    saved = load_config(run / "config.yaml")
    assert saved.lora is not None and (saved.lora.r, saved.lora.r_vision, saved.lora.projector) == (4, 2, "full")
    assert saved.model.name == str(first / "adapter") and settle(saved) == saved
    losses, whole = losses_of(run), load_file(run / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    for path in (run / "summary.json", run / "adapter"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(load_config(run / "config.yaml"))  # goes on at step 2
    assert "continuing from" in (run / "logs" / "rank-0.log").read_text() and losses_of(run) == losses
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
    record = read_record(run / "adapter")
    assert record is not None and record["base"]["name"] == llava
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == llava
    assert f"went on from the adapter in `{first / 'adapter'}`" in (run / "adapter" / "README.md").read_text()
    assert main(["generate", str(run), "--prompt", "What?", "--max-new-tokens", "2"]) == 0
    assert main(["export", str(run), "--to", "merged-16bit", "--samples", "1"]) == 0
    assert f"base_model: {llava}\n" in (run / "export" / "merged-16bit" / "README.md").read_text()


def test_from_an_adapter_of_others(tmp_path, llava, qwen, four):
    """On the output head, too: what PEFT made trains on, and the base's form is told by nothing but the settings."""
    adapter = of_peft(qwen, tmp_path / "mine", target_modules=["q_proj", "v_proj", "lm_head"], lora_alpha=8)
    settings = first_settings(tmp_path, str(adapter), four) | {"lora": {"r": 4, "dropout": 0.1}}
    train(load_config(write_config(settings, tmp_path), ["model.load_in_4bit=false"]))
    made = tmp_path / "runs" / "first" / "adapter"
    model, _ = load_trained(str(made), CPU)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1) and "lm_head" in config.target_modules
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, made))
    moved = [key for key in after if not torch.equal(before[key], after[key])]
    assert len(moved) == len([key for key in before if "lora_" in key])


def test_from_a_checkpoint_of_a_run_and_from_a_whole_model(first, tmp_path, llava, four):
    (checkpoint,) = (first / "checkpoints").iterdir()
    config = load_config(write_config(first_settings(tmp_path, str(checkpoint), four), tmp_path))
    assert settle(config).lora == config.lora.model_copy(update={"experts": "off"})  # the adapter has none on experts
    model, _ = load_trained(str(checkpoint), CPU)
    assert model.is_loaded_in_4bit  # as its run says
    full = tmp_path / "full"
    shutil.copytree(llava, full / "model")
    shutil.copy(first / "config.yaml", full)
    assert settle(load_config(write_config(first_settings(tmp_path, str(full), four), tmp_path))).model.name == str(full / "model")


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"r": 8}, r"lora.r: 8, but the adapter in .* has 4, and training goes on with its form; leave lora.r away"),
        ({"vision": False}, r"lora.vision: False, but"),
        ({"projector": "lora"}, r"lora.projector: lora, but the adapter in .* has full"),
        ({"modules": ["q_proj"]}, r"lora.modules: \['q_proj'\], but"),
        ({"layers": {"language": [0]}}, r"lora.layers: .*, but"),
        (None, r"is an adapter, which trains on as one; leave lora away"),
    ],
)
def test_another_form_is_refused(first, tmp_path, four, lora, reason):
    settings = first_settings(tmp_path, str(first), four) | {"lora": lora}
    if lora is None:
        settings["model"]["load_in_4bit"] = False
    with pytest.raises(ConfigError, match=reason) as caught:
        train(load_config(write_config(settings, tmp_path)))
    assert "\n" not in str(caught.value) and not (tmp_path / "runs" / "first").exists()


def test_what_is_said_of_the_form_and_true_is_taken(first):
    family = FAMILIES["llava"]
    said = LoraConfig(r=4, r_vision=2, projector="full", layers={"language": [-2, -1]}, dropout=0.3, language=True)
    found = lora_of(first / "adapter", family, said)
    assert found.dropout == 0.3 and found.layers == {"language": [-2, -1]} and found.modules == []
    assert lora_of(first / "adapter", family, found) == found


def test_where_nothing_can_go_on(first, tmp_path, four):
    folder = Path(shutil.copytree(first / "adapter", tmp_path / "adapter"))
    config = load_config(write_config(first_settings(tmp_path, str(folder), four), tmp_path))
    stated = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**stated, "base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(
        ModelError, match=r"its base /nowhere/base does not exist; say where it is now with --base-model, or in its adapter"
    ):
        train(config)
    (folder / "adapter_config.json").write_text(json.dumps({**stated, "peft_type": "IA3"}))
    with pytest.raises(ModelError, match="a IA3 adapter; only LoRA adapters can be trained further"):
        train(config)


def test_dry_run_and_plan_know_it(first, tmp_path, four, capsys):
    path = str(write_config(first_settings(tmp_path, str(first), four) | {"lora": {}}, tmp_path))
    assert main(["train", path, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"] == "LoRA r=4"
    trainable = sum(tensor.numel() for tensor in load_file(first / "adapter" / "adapter_model.safetensors").values())
    assert main(["plan", path, "--gpu", "rtx4090", "--json", "--quick"]) == 0
    assert json.loads(capsys.readouterr().out)["own"]["memory"]["gradients"] == 4 * trainable
