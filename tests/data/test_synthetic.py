"""Synthetic data: right by construction, the same for the same seed, no scene in both splits."""

from __future__ import annotations

import hashlib
import io
import json
import random

import pytest
from PIL import Image

from vlm_dist.data import synthetic
from vlm_dist.data.shards import read_in_order
from vlm_dist.data.synthetic import COLOURS, PLACES, Shape, caption, draw_scene, questions, random_scene, split_of, synthesise
from vlm_dist.errors import DataError

SETTINGS = {"seed": 3, "size": 32, "image_format": "png", "shard_size": 8, "questions_per_picture": 2}


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def test_same_seed_same_bytes(tmp_path):
    for name in ("a", "b"):
        synthesise(tmp_path / name, train=20, heldout=5, tasks=("qa", "reading"), **SETTINGS)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(digests(tmp_path / "a")) == 2 * (3 + 1)
    synthesise(tmp_path / "c", train=20, heldout=5, tasks=("qa", "reading"), **{**SETTINGS, "seed": 4})
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_again_changes_nothing_and_other_settings_are_refused(tmp_path):
    synthesise(tmp_path, train=4, heldout=2, tasks=("qa",), **SETTINGS)
    before = digests(tmp_path)
    synthesise(tmp_path, train=4, heldout=2, tasks=("qa",), **SETTINGS)
    assert digests(tmp_path) == before
    with pytest.raises(DataError, match="train=4 \\(asked: 5\\)"):
        synthesise(tmp_path, train=5, heldout=2, tasks=("qa",), **SETTINGS)


def test_splits_share_no_scene(monkeypatch):
    seen = {"train": set(), "heldout": set()}
    draw = synthetic.draw_scene

    def watch(scene, size, rng):
        seen[split_of(scene)].add(scene)
        return draw(scene, size, rng)

    monkeypatch.setattr(synthetic, "draw_scene", watch)
    for split in ("train", "heldout"):
        for task in ("caption", "qa"):
            before = {name: set(scenes) for name, scenes in seen.items()}
            list(synthetic.samples(task, split, 40, seed=0, size=16, image_format="jpg"))
            other = "heldout" if split == "train" else "train"
            assert seen[other] == before[other]
    assert seen["train"] and seen["heldout"] and not seen["train"] & seen["heldout"]


def test_answers_agree_with_the_scene():
    rng = random.Random(0)
    for _ in range(200):
        scene = random_scene(rng)
        assert caption(scene).count(" and ") == len(scene) - 1
        assert caption(scene).startswith(("one shape: ", "two shapes: ", "three shapes: ")[len(scene) - 1])
        for kind, question, answer in questions(scene):
            found = {
                "colour": [s.colour for s in scene if s.place in question],
                "where": [s.place for s in scene if s.shape in question],
                "shape": [s.shape for s in scene if s.place in question],
                "count": [synthetic.COUNTS[len(scene)]],
            }[kind]
            assert found == [answer]


def test_the_picture_shows_what_the_scene_says():
    for place, (column, row) in PLACES.items():
        for colour, rgb in COLOURS.items():
            picture = draw_scene((Shape(place, colour, "square"),), 64, random.Random(1))
            pixels = [picture.getpixel((x, y)) for x in range(column * 32, column * 32 + 32) for y in range(row * 32, row * 32 + 32)]
            assert rgb in pixels
            assert rgb not in [picture.getpixel((x, y)) for x in range((1 - column) * 32, (1 - column) * 32 + 32) for y in range(64)]


def test_shards_hold_messages_and_pictures(shards):
    for name, paths in shards.items():
        for raw in read_in_order(paths):
            record = json.loads(raw["json"])
            assert [message["role"] for message in record["messages"]][:2] == ["user", "assistant"]
            assert Image.open(io.BytesIO(raw["jpg"])).size == (32, 32)
            assert record["task"] == name.split("-")[0]
            assert name.endswith("train") or len(record["messages"]) == 2


def test_command(tmp_path, capsys):
    from vlm_dist.cli.main import main

    assert main(["data", "synth", str(tmp_path), "--train", "3", "--heldout", "2", "--tasks", "reading", "--format", "webp"]) == 0
    assert "reading-train" in capsys.readouterr().out
    assert main(["data", "synth", str(tmp_path / "x"), "--train", "0"]) == 3
    assert "--train" in capsys.readouterr().err
