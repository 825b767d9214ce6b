"""An adapter folder says what it was trained on, and loading holds it to that."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import write_config
from vlm_dist import FastVisionModel, load_config, train
from vlm_dist.cli.main import main
from vlm_dist.errors import ModelError
from vlm_dist.models.record import read_record, write_record
from vlm_dist.models.trained import load_trained
from vlm_dist.testing import tiny_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards) -> Path:
    """An adapter folder beside the base that it was trained on."""
    folder = tmp_path_factory.mktemp("record")
    tiny_checkpoint("llava", folder / "base")
    settings = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "model": {"name": str(folder / "base")},
        "lora": {"r": 4, "projector": "full"},
        "data": {"train": shards["qa-train"], "heldout": shards["qa-heldout"], "max_seq_length": 256},
        "optim": {"lr": 2e-2},
        "training": {"steps": 4, "global_batch": 2},
        "evaluation": {"samples": 3, "max_new_tokens": 4},
        "log": {"wandb": "disabled"},
    }
    train(load_config(write_config(settings, folder)))
    return folder / "runs" / "tiny" / "adapter"


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def save_again(adapter: Path) -> None:
    """As if it had been saved so: what each file holds is right, what it is for is not."""
    write_record(json.loads((adapter / "vlm_dist.json").read_text()), adapter)


def test_contents(adapter):
    card = (adapter / "README.md").read_text()
    record = json.loads((adapter / "vlm_dist.json").read_text())
    assert card.startswith("---\nbase_model: ") and "rank 4" in card and "| after | " in card
    assert len(record["base"]["fingerprint"]) == 64 and record["base"]["load_in_4bit"] is True
    assert record["preprocessing"]["class"] == "LlavaProcessor"
    assert record["preprocessing"]["image_processor.size"] == {"height": 32, "width": 32}
    assert [len(row["tokens"]) for row in record["probe"]["rows"]] == [64, 64]


def test_loads_by_itself(adapter):
    model, processor = load_trained(str(adapter), CPU)
    assert model.peft_config["default"].r == 4 and processor.chat_template
    again, _ = FastVisionModel.from_pretrained(str(adapter))
    for (name, ours), (_, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours.detach().view(torch.uint8), theirs.detach().view(torch.uint8)), name


def test_the_cards_own_words_work(adapter):
    """The README's second way: PEFT alone."""
    code = (adapter / "README.md").read_text().split("```python\n")[2].split("```")[0]
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(adapter)), names)
    assert names["model"].peft_config["default"].r == 4


def test_another_base_of_the_same_shape_is_refused(adapter, tmp_path):
    """Whether it is given, or written into adapter_config.json."""
    other = str(tiny_checkpoint("llava", tmp_path / "other", seed=1))
    with pytest.raises(ModelError, match=r"trained on other weights than '.*other' holds now"):
        load_trained(str(adapter), CPU, base_model=other)
    change_json(adapter / "adapter_config.json", lambda config: config.update(base_model_name_or_path=other))
    with pytest.raises(ModelError, match=r"trained on other weights than '.*other' holds now"):
        load_trained(str(adapter), CPU)


def test_a_base_that_moved_is_found_by_what_was_corrected(trained, tmp_path):
    """By hand in adapter_config.json, as with PEFT, or in the run's config.yaml; the record and the other file still name the old place."""
    from ruamel.yaml import YAML

    run = Path(shutil.copytree(trained.parent, tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoints")))
    base = read_record(trained)["base"]["name"]
    for path in (run / "adapter" / "vlm_dist.json", run / "adapter" / "adapter_config.json", run / "config.yaml"):
        path.write_text(path.read_text().replace(base, "/gone/base"))
    for source in (run, run / "adapter"):
        with pytest.raises(ModelError, match="its base /gone/base does not exist; say where it is now with --base-model"):
            load_trained(str(source), CPU)
    change_json(run / "adapter" / "adapter_config.json", lambda config: config.update(base_model_name_or_path=base))
    load_trained(str(run), CPU)
    load_trained(str(run / "adapter"), CPU)
    change_json(run / "adapter" / "adapter_config.json", lambda config: config.update(base_model_name_or_path="/gone/base"))
    config = YAML(typ="safe").load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(json.dumps({**config, "model": {**config["model"], "name": base}}))
    load_trained(str(run), CPU)
    load_trained(str(run), CPU, base_model=base)


def test_other_preprocessing_is_refused_by_name(adapter):
    files = [path for path in adapter.glob("*processor_config.json") if "image_mean" in path.read_text()]
    path = files[0]

    def other_mean(config):
        (config.get("image_processor") or config)["image_mean"] = [0.5, 0.5, 0.5]

    change_json(path, other_mean)
    save_again(adapter)
    with pytest.raises(
        ModelError, match=r"preprocessing differs from training: image_processor.image_mean was \[0.48.*, is \[0.5, 0.5, 0.5\]"
    ):
        load_trained(str(adapter), CPU)


def test_keys_that_match_nothing_are_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({key.replace("language_model", "text_model"): value for key, value in load_file(path).items()}, path)
    save_again(adapter)
    with pytest.raises(ModelError, match=r"28 of the adapter's 44 tensors fit no module of the model, e.g. .*text_model"):
        load_trained(str(adapter), CPU)


def test_missing_tensors_are_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "layers.0.mlp" not in key}, path)
    save_again(adapter)
    with pytest.raises(ModelError, match=r"are missing in adapter_model.safetensors, e.g. .*layers.0.mlp"):
        load_trained(str(adapter), CPU)


def test_changed_weights_give_other_logits(adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({key: value + 0.1 if "lora_B" in key else value for key, value in load_file(path).items()}, path)
    save_again(adapter)
    with pytest.raises(ModelError, match=r"logits differ from the trained one's by .* \(limit 1%\)"):
        load_trained(str(adapter), CPU)


def test_a_damaged_record_is_told(adapter):
    (adapter / "vlm_dist.json").write_text("{")
    with pytest.raises(ModelError, match=r"vlm_dist\.json: is damaged"):
        load_trained(str(adapter), CPU)


def test_an_adapter_of_others_loads_without_checks(adapter):
    (adapter / "vlm_dist.json").unlink()
    model, _ = load_trained(str(adapter), CPU)
    assert model.peft_config["default"].r == 4
    change_json(adapter / "adapter_config.json", lambda config: config.pop("base_model_name_or_path"))
    with pytest.raises(ModelError, match="names no base model"):
        load_trained(str(adapter), CPU)


def test_in_another_form_only_the_logits_go_unchecked(adapter):
    """In 16 bit the base gives other logits than in NF4, rightly."""
    model, _ = FastVisionModel.from_pretrained(str(adapter), load_in_4bit=False)
    assert not hasattr(model, "quantization_method") and model.peft_config["default"].r == 4


def test_export_adapter(trained, tmp_path, capsys):
    run = trained.parent
    assert main(["export", str(run), "--to", "adapter", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert f"written: {tmp_path / 'out'}" in shown.out and "the adapter changes the vision too; servers such as vLLM" in shown.err

    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "README.md"}

    assert files(tmp_path / "out") == files(trained)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and "A LoRA adapter for" in card
    for picture in re.findall(r"!\[\]\((.+?)\)", card):
        assert (tmp_path / "out" / picture).is_file()
    assert main(["export", str(run), "--to", "adapter", "--out", str(tmp_path / "out")]) == 2
    assert "exists already; give a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("onto", [None, "dequantised"])
def test_export_merged(trained, capsys, onto):
    from transformers import AutoModelForImageTextToText

    run = trained.parent
    assert main(["export", str(run), "--to", "merged-16bit", "--samples", "3", "--json", *(["--onto", onto] if onto else [])]) == 0
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert told["out"] == str(run / "export" / "merged-16bit")
    comparison = told["comparison"]
    assert comparison == json.loads((run / "export" / "merged-16bit" / "merge.json").read_text())
    assert comparison["onto"] == (onto or "original") and comparison["samples"] == 3
    if onto:
        assert comparison["largest_logit_difference"] < 0.1 * comparison["logit_spread"]
    assert AutoModelForImageTextToText.from_pretrained(told["out"]).dtype == torch.bfloat16
    card = (run / "export" / "merged-16bit" / "README.md").read_text()
    assert "library_name: transformers" in card and f"Merged onto the {comparison['onto']} weights" in card and told["warning"] == ""


def test_a_merged_model_that_fits_nowhere(trained, tmp_path, capsys, monkeypatch):
    """It is written all the same, and what was not looked at is told; the card is only taken where there is room beside the trained one."""
    from vlm_dist.models import export

    assert export.place_for(10**6, torch.device("cpu")) == torch.device("cpu")
    for free, place in ((2 * 10**6, "cuda"), (10**6, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10**9))
        assert export.place_for(10**6, torch.device("cuda")).type == place
    monkeypatch.setattr(export, "available_memory", lambda: 1000)
    out = tmp_path / "out"
    assert main(["export", str(trained.parent), "--to", "merged-16bit", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert "the GPU and the host's memory have too little room" in told["comparison"]["left_out"] and told["comparison"]["samples"] == 0
    assert "not compared with the trained model: its weights take" in (out / "README.md").read_text()
    assert list(out.glob("*.safetensors"))


def test_a_hub_that_cannot_be_reached(trained, tmp_path, capsys):
    """What was exported stays, and one line says so. (That the hub takes it cannot be shown without a network.)"""
    assert main(["export", str(trained.parent), "--to", "adapter", "--out", str(tmp_path / "out"), "--push", "me/it"]) == 4
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("vlm-dist: export --push me/it: the hub does not take it (") and str(tmp_path / "out") in line
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda run: shutil.rmtree(run / "adapter"), "has no trained model yet"),
        (lambda run: ((run / "config.yaml").unlink(), shutil.rmtree(run / "adapter")), "no run directory"),
        (
            lambda run: change_json(run / "config.yaml", lambda c: (c.update(lora=None), c["model"].update(load_in_4bit=False))),
            "nothing to merge",
        ),
    ],
)
def test_what_cannot_be_exported_says_why(trained, tmp_path, capsys, change, reason):
    from ruamel.yaml import YAML

    run = Path(shutil.copytree(trained.parent, tmp_path / "run", ignore=shutil.ignore_patterns("export")))
    config = YAML(typ="safe").load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(json.dumps(config))
    change(run)
    assert main(["export", str(run), "--to", "merged-16bit"]) != 0
    line = capsys.readouterr().err
    assert reason in line and line.count("\n") == 1
    assert not (run / "export").exists()
