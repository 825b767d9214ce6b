"""data.cache_features: the tower of a frozen side computes each picture once, and nothing that is learnt changes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from tests.conftest import losses_of, write_config
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.errors import ConfigError
from vlm_dist.families import FAMILIES
from vlm_dist.models.features import TowerFeatures, check_features

FAMILIES_KEPT = sorted(name for name, row in FAMILIES.items() if row.caches)


@pytest.fixture
def start(settings, tmp_path, checkpoint):
    """A function that trains 60 samples three times over and returns the run's folder."""
    settings["data"] |= {"heldout": [], "cache_dir": str(tmp_path / "cache")}
    settings["training"] = {"epochs": 3, "global_batch": 12, "micro_batch": 6}
    settings["lora"] |= {"vision": False}

    def run(name: str, family: str = "llava", *overrides: str) -> Path:
        settings["model"]["name"] = checkpoint(family)
        train(load_config(write_config(settings, tmp_path), [f"name={name}", *overrides]))
        return Path(settings["output_dir"]) / name

    return run


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("features/*/*/*.safetensors"))


def share_read(folder: Path) -> list[float]:
    return [row["features_read"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "features_read" in row]


@pytest.mark.parametrize("family", FAMILIES_KEPT)
def test_what_is_learnt_stays(start, tmp_path, family, monkeypatch):
    """What the second epoch does not find yet (its first steps are prepared in the first), the third does, and a second run from the
    beginning; losses are those without."""
    expected = losses_of(start("plain", family))
    first = start("first", family, "data.cache_features=true")
    assert losses_of(first) == pytest.approx(expected, rel=1e-5)
    share, steps = share_read(first), len(expected) // 3
    assert share[0] < 0.9 and share[-steps:] == [1.0] * steps
    computed = []
    monkeypatch.setattr(TowerFeatures, "_write", lambda *found: computed.append(found))
    again = start("again", family, "data.cache_features=true")
    assert losses_of(again) == pytest.approx(expected, rel=1e-5) and set(share_read(again)) == {1.0} and not computed


@pytest.mark.parametrize("change", ["model.dtype=bfloat16", "model.load_in_4bit=false"])
def test_another_tower_or_number_type_has_files_of_its_own(start, tmp_path, change):
    start("first", "llava", "data.cache_features=true")
    before = kept(tmp_path / "cache")
    start("other", "llava", "data.cache_features=true", change)
    assert len(kept(tmp_path / "cache")) == 2 * len(before) > 0


def test_damaged_files_are_told_and_computed_again(start, tmp_path, caplog):
    expected = losses_of(start("first", "llava", "data.cache_features=true"))
    cut, empty, other, *_ = files = kept(tmp_path / "cache")
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    empty.write_bytes(b"")
    other.write_bytes(whole[:-40] + bytes(40))  # as after a machine that lost its power
    again = start("again", "llava", "data.cache_features=true")
    assert losses_of(again) == pytest.approx(expected, rel=1e-5)
    assert all(f"data.cache_features: '{file}' cannot be read" in caplog.text for file in (cut, empty, other))
    assert kept(tmp_path / "cache") == files and {len(file.read_bytes()) for file in (cut, empty, other)} == {len(whole)}
    assert other.read_bytes()[-40:] != bytes(40)


def test_files_that_cannot_be_read_are_left_alone(start, tmp_path, caplog):
    expected = losses_of(start("first", "llava", "data.cache_features=true"))
    for file in kept(tmp_path / "cache"):
        file.unlink()
        file.mkdir()
    assert losses_of(start("again", "llava", "data.cache_features=true")) == pytest.approx(expected, rel=1e-5)
    assert caplog.text.count("cannot be read (Is a directory); such pictures are computed again") == 1
    assert all(file.is_dir() for file in kept(tmp_path / "cache"))


def test_what_older_towers_leave_no_room_for_is_told(start, tmp_path, caplog):
    start("older", "llava", "data.cache_features=true")
    before = kept(tmp_path / "cache")
    start("newer", "internvl", "data.cache_features=true", "data.features_gb=0.00001")
    assert kept(tmp_path / "cache") == before
    assert caplog.text.count("is full; features of further pictures are computed each time") == 1


def test_a_folder_that_is_full_is_told_once(start, tmp_path, caplog):
    full = start("full", "llava", "data.cache_features=true", "data.features_gb=0.00002")
    assert losses_of(full) == pytest.approx(losses_of(start("plain")), rel=1e-5)
    assert caplog.text.count("is full; features of further pictures are computed each time") == 1
    assert 0 < sum(file.stat().st_size for file in kept(tmp_path / "cache")) <= 20_000


def test_a_file_where_the_folder_should_be(start, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(ConfigError, match=r"data.cache_dir: '.*' cannot be made \(Not a directory\); give a folder"):
        start("refused", "llava", "data.cache_features=true")


@pytest.mark.parametrize(
    ("family", "overrides", "words"),
    [
        ("llava", ["lora.vision=true"], r"data.cache_features: [\d,]+ weights of the vision tower train, .*lora.vision: false"),
        (
            "qwen2_5_vl",
            [],
            "the vision tower of qwen2_5_vl takes .* another form .* kept of gemma3, internvl, llava, mini_vlm",
        ),
        ("llava", ["engine.zero_stage=3"], "at ZeRO stage 3 all ranks compute the tower together"),
    ],
)
def test_what_cannot_be_kept(start, family, overrides, words):
    with pytest.raises(ConfigError, match=words):
        start("refused", family, "data.cache_features=true", *overrides)


def test_several_layers_of_a_tower(settings, tmp_path):
    config = load_config(write_config(settings, tmp_path), ["data.cache_features=true"])
    with pytest.raises(ConfigError, match="reads several layers of its tower"):
        check_features(config, FAMILIES["llava"], type("Config", (), {"vision_feature_layer": [-2, -5]}), 1)


def test_the_dry_run_refuses_too(settings, tmp_path, checkpoint, capsys):
    settings["model"]["name"] = checkpoint("qwen2_5_vl")
    code = main(["train", str(write_config(settings, tmp_path)), "--dry-run", "data.cache_features=true"])
    assert code == 2 and "data.cache_features: the vision tower of qwen2_5_vl" in capsys.readouterr().err


def test_encoders_that_give_maps(tmp_path):
    """A convolutional encoder's features are [N, channels, rows, columns]; the mini VLM asks for a sequence first."""
    from transformers import ResNetConfig, ResNetModel

    from vlm_dist.models.mini_vlm import features_of

    tower = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")).eval()
    pixels = torch.rand(3, 3, 32, 32)
    expected = features_of(tower(pixel_values=pixels)).detach()
    features = TowerFeatures(tower, tmp_path, 10**9)
    for known in ([], [0, 1, 2]):
        batch = features.ahead({"pixel_values": pixels})
        assert len(batch["picture_keys"]) == 3 - len(known)
        with features.of(batch):
            assert torch.equal(features_of(tower(pixel_values=batch["pixel_values"])), expected)
        features._writer.submit(int).result()
    other = torch.cat([torch.rand(1, 3, 32, 32), pixels[1:]])
    batch = features.ahead({"pixel_values": other})
    assert len(batch["pixel_values"]) == 1
    expected = features_of(features._compute(pixel_values=other))
    with features.of(batch):
        torch.testing.assert_close(features_of(tower(pixel_values=batch["pixel_values"])), expected)
    features.close()


def test_what_is_kept_is_what_was_computed(tmp_path):
    """Also of a model that writes into its features; and of pictures of one colour, whose bytes are those of one of another shape."""

    class Tower(torch.nn.Module):
        def forward(self, pixel_values):
            return type("Output", (), {"last_hidden_state": pixel_values.flatten(2).transpose(1, 2) + 1})()

    tower = Tower()
    features = TowerFeatures(tower, tmp_path, 10**9)
    behind = threading.Event()
    features._writer.submit(behind.wait)
    with features.of(features.ahead({"pixel_values": torch.zeros(2, 3, 4, 8)})):
        tower(torch.zeros(2, 3, 4, 8)).last_hidden_state.zero_()
    behind.set()
    features._writer.submit(int).result()
    known = features.ahead({"pixel_values": torch.zeros(1, 3, 4, 8)})["known_features"]
    assert torch.equal(known, torch.ones(1, 32, 3))
    assert "known_features" not in features.ahead({"pixel_values": torch.zeros(1, 3, 8, 4)})
    features.close()
