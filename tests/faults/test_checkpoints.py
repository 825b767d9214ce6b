"""Checkpoints that only look whole, that are of other shapes, optimizers, inputs or versions: one line, and nothing is changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import losses_of, write_config
from vlm_dist import load_config, train
from vlm_dist.checkpoints.form import amend_state, find_checkpoints, newest_good_checkpoint, read_state, verify_checkpoint
from vlm_dist.checkpoints.mirror import fetch_newest, send_file
from vlm_dist.cli.main import main
from vlm_dist.errors import CheckpointError
from vlm_dist.run_dir import read_jsonl
from vlm_dist.training.health import DivergedError

FILES = ["MANIFEST.json", "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, shards, llava) -> Path:
    """A run with checkpoints at steps 1 and 2 and no result yet, as a kill leaves it; base and shards lie beside it."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(llava, folder / "base")
    (folder / "data").mkdir()
    names = [shutil.copy(path, folder / "data") for path in shards["qa-train"]]
    settings = {
        "name": "tiny", "output_dir": str(folder / "runs"), "model": {"name": str(folder / "base")}, "lora": {"r": 4},
        "data": {"train": [str(name) for name in names], "max_seq_length": 256}, "training": {"steps": 2, "global_batch": 2},
        "checkpoint": {"save_every": 1, "keep_last": 3}, "log": {"wandb": "disabled"},
    }  # fmt: skip
    train(load_config(write_config(settings, folder)))
    run = folder / "runs" / "tiny"
    shutil.rmtree(run / "adapter")
    (run / "summary.json").unlink()
    return folder


@pytest.fixture
def place(begun, tmp_path) -> Path:
    """A copy of it whose configuration speaks of the copy."""
    shutil.copytree(begun, tmp_path / "copy")
    for file in (tmp_path / "copy" / "config.yaml", tmp_path / "copy" / "runs" / "tiny" / "config.yaml"):
        file.write_text(file.read_text().replace(str(begun), str(tmp_path / "copy")))
    return tmp_path / "copy"


def newest(place: Path) -> Path:
    return find_checkpoints(place / "runs" / "tiny" / "checkpoints")[0]


def fails(place: Path, capsys, *more: str) -> tuple[int, str]:
    """Continue; the one line and the exit code. Nothing in the run may have been lost."""
    before = {path: path.read_bytes() for path in (place / "runs" / "tiny" / "checkpoints").rglob("*") if path.is_file()}
    capsys.readouterr()
    code = main(["train", str(place / "config.yaml"), *more])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code != 0 and len(lines) == 1 and lines[0].startswith("vlm-dist: "), lines
    assert {path: path.read_bytes() for path in before} == before
    return code, lines[0]


def write_whole(path: Path, **files: object) -> None:
    """Change JSON files of a checkpoint, and its manifest with them."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    for name, value in files.items():
        text = json.dumps(value)
        (path / f"{name}.json").write_text(text)
        manifest["sha256"][f"{name}.json"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "manifest", [{}, [], {"sha256": {}}, {"version": 1, "sha256": {}}, {"version": 1, "sha256": []}, {"sha256": None}, 1]
)
def test_a_manifest_that_lists_nothing_proves_nothing(place, manifest):
    (newest(place) / "MANIFEST.json").write_text(json.dumps(manifest))
    assert "MANIFEST.json" in (verify_checkpoint(newest(place)) or "")
    found = newest_good_checkpoint(place / "runs" / "tiny" / "checkpoints")
    assert found is not None and found.name == "step-00000001"


@pytest.mark.parametrize("name", FILES[1:])
def test_a_part_that_neither_the_disk_nor_the_manifest_has(place, name, capsys):
    path = newest(place)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    del manifest["sha256"][name]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    (path / name).unlink()
    assert f"{name}" in (verify_checkpoint(path) or "") and "is not in MANIFEST.json" in (verify_checkpoint(path) or "")
    assert main(["checkpoints", str(place / "runs" / "tiny"), "--verify"]) == 5
    assert name in capsys.readouterr().out


def test_a_manifest_speaks_only_of_its_own_folder(place):
    path = newest(place)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["sha256"]["../step-00000001/state.json"] = "0" * 64
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert "names a file elsewhere" in (verify_checkpoint(path) or "")


@pytest.mark.parametrize("missing", ["step", "progress", "data", "health", "patience", "base_fingerprint"])
def test_a_state_that_lacks_what_continuing_needs(place, missing):
    state = json.loads((newest(place) / "state.json").read_text())
    del state[missing]
    write_whole(newest(place), state=state)
    assert verify_checkpoint(newest(place)) == f"state.json holds no '{missing}'"


@pytest.mark.parametrize("state", [[], 1, None, "state"])
def test_a_state_that_is_none(place, state):
    write_whole(newest(place), state=state)
    assert verify_checkpoint(newest(place)) == "state.json holds no state"


@pytest.mark.parametrize("version", [2, 4, "3", None])
def test_another_version_is_refused_and_not_gone_back_behind(place, capsys, version):
    state = json.loads((newest(place) / "state.json").read_text())
    write_whole(newest(place), state={**state, "version": version})
    code, line = fails(place, capsys)
    assert code == 5 and f"state.json is of version {version}, this vlm_dist reads version 3" in line
    assert main(["checkpoints", str(place / "runs" / "tiny"), "--verify"]) == 5
    assert "version" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.r=8", "holds other shapes than this model trains"),
        ("optim.name=adamw_8bit", "holds the state of another optimizer (adamw; optim.name is adamw_8bit now)"),
        ("lora.projector=lora", "holds other parameters than this model trains"),
    ],
)
def test_another_form_with_resume_anyway(place, capsys, override, words):
    code, line = fails(place, capsys, override, "--resume-anyway")
    assert code == 5 and words in line and "start a run of another name" in line


def test_moments_of_another_shape(place, capsys):
    from safetensors.torch import load_file, save_file

    path = newest(place) / "optimizer.safetensors"
    moments = load_file(path)
    name = next(name for name in moments if name.endswith("exp_avg"))
    for change, words in ((moments[name][..., :1].clone(), "another shape"), (None, "of no parameter that trains")):
        changed = {**moments, **({name: change} if change is not None else {"nowhere/exp_avg": moments[name].clone()})}
        save_file(changed, path)
        manifest = json.loads((newest(place) / "MANIFEST.json").read_text())
        manifest["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        (newest(place) / "MANIFEST.json").write_text(json.dumps(manifest))
        assert words in fails(place, capsys)[1]


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def other_content(place: Path) -> None:
    """One word of one caption, at the same size."""
    shard = sorted((place / "data").iterdir())[1]
    data = bytearray(shard.read_bytes())
    at = data.index(b'"role"')
    data[at + 1 : at + 5] = b"rolf"
    shard.write_bytes(data)


def other_activation(place: Path) -> None:
    config = json.loads((place / "base" / "config.json").read_text())
    config["text_config"]["hidden_act"] = "gelu"
    (place / "base" / "config.json").write_text(json.dumps(config))


def other_template(place: Path) -> None:
    file = place / "base" / "chat_template.jinja"
    file.write_text(file.read_text() + " ")


def other_processor(place: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (file := place / "base" / name).exists():
            text = file.read_text()
            assert '"image_mean": [\n' in text
            file.write_text(text.replace('"image_mean": [\n', '"image_mean": [\n0.25, ').replace("0.25, ", "0.25, ", 1))
            found = json.loads(file.read_text())
            images = found.get("image_processor", found)
            images["image_mean"] = images["image_mean"][:3]
            file.write_text(json.dumps(found))


def other_tokenizer(place: Path) -> None:
    """Same words, same numbers; another way to them."""
    file = place / "base" / "tokenizer.json"
    change_json(file, normalizer={"type": "Lowercase"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_content, "data train: "),
        (other_activation, 'model text_config.hidden_act: was "silu", is "gelu"'),
        (other_template, "processor chat_template.sha256: other content"),
        (other_processor, "processor image_processor.image_mean: was "),
        (other_tokenizer, "processor tokenizer.sha256: other content"),
    ],
)
def test_other_inputs_are_listed(place, capsys, change, words):
    change(place)
    code, line = fails(place, capsys)
    assert code == 5 and words in line and "--resume-anyway" in line


def test_insisting_goes_on_and_is_told(place):
    other_template(place)
    config = load_config(place / "config.yaml")
    assert train(config, resume_anyway=True)["ended"] == "finished"
    (event,) = [row for row in read_jsonl(place / "runs" / "tiny" / "events.jsonl") if row["event"] == "inputs changed"]
    assert "chat_template" in event["text"] and event["step"] == 2


def test_a_checkpoint_without_these_fields_continues_and_says_so_once(place, capsys):
    for path in find_checkpoints(newest(place).parent):
        state = json.loads((path / "state.json").read_text())
        del state["inputs"]
        write_whole(path, state=state)
    assert main(["train", str(place / "config.yaml")]) == 0
    assert capsys.readouterr().out.count("is of an earlier vlm_dist: processor, tokenizer and shards cannot be compared") == 1


def test_large_data_sets_are_read_in_pieces(place, monkeypatch):
    """Evenly: every shard of a few, and groups of many."""
    from vlm_dist.config import DataConfig
    from vlm_dist.data import content
    from vlm_dist.data.dataset import open_datasets

    (dataset,) = open_datasets(DataConfig(train=str(place / "data" / "*.tar")))
    whole = content.content_digests(dataset)
    assert list(whole) == sorted(path.name for path in (place / "data").iterdir())
    monkeypatch.setattr(content, "WHOLE", 0)
    monkeypatch.setattr(content, "PIECES", 7)
    places = content._spread(dataset.index.sizes.tolist(), 7)
    assert sum(map(len, places)) == 7 and all(0 < len(starts) <= 3 for starts in places)
    assert all(start < size for starts, size in zip(places, dataset.index.sizes, strict=True) for start in starts)
    monkeypatch.setattr(content, "GROUPS", 2)
    assert len(content.content_digests(dataset)) == 2 and content.content_digests(dataset) != whole


def test_what_is_added_later_leaves_it_whole_at_every_moment(place, tmp_path):
    path, steps = newest(place), []

    def look(file: Path) -> None:
        steps.append(file.name)
        assert verify_checkpoint(path) is None
        send_file(file, str(tmp_path / "mirror"))
        shutil.rmtree(tmp_path / "fetched", ignore_errors=True)
        assert fetch_newest(str(tmp_path / "mirror"), tmp_path / "fetched") is not None

    shutil.copytree(path, tmp_path / "mirror" / path.name)
    amend_state(path, {"scores": {"exact_match": 0.5}, "owes": None}, look)
    assert steps == ["MANIFEST.json", "state.json", "MANIFEST.json"]
    assert read_state(path)["scores"] == {"exact_match": 0.5} and "owes" not in read_state(path)
    assert "before" not in json.loads((path / "MANIFEST.json").read_text())


def test_a_run_that_diverged_before_its_first_checkpoint_promises_none(place, monkeypatch):
    from vlm_dist.training import train as loop

    monkeypatch.setattr(loop, "summed_loss", lambda *arguments, f=loop.summed_loss: f(*arguments) * float("nan"))
    for name, words in (("new", "no checkpoint was saved yet"), ("tiny", "the last checkpoint, step-00000002, is intact")):
        config = load_config(place / "config.yaml", [f"name={name}", "training.steps=9", "health.max_skipped=0", "checkpoint.save_every=9"])
        with pytest.raises(DivergedError, match=words):
            train(config, resume_anyway=True)


def test_a_finished_run_whose_result_is_gone(place, capsys):
    """Exported again from the last checkpoint; refused where there is none, instead of trained anew."""
    config, run = str(place / "config.yaml"), place / "runs" / "tiny"
    assert main(["train", config]) == 0
    losses = losses_of(run)
    for spoil in (lambda: shutil.rmtree(run / "adapter"), lambda: (run / "adapter" / "adapter_model.safetensors").unlink()):
        spoil()
        capsys.readouterr()
        assert main(["train", config]) == 0
        assert "exporting it again from its last checkpoint" in capsys.readouterr().out and losses_of(run) == losses
        assert (run / "adapter" / "adapter_model.safetensors").exists()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint is left to export it from"):
        train(load_config(config))
    assert losses_of(run) == losses
