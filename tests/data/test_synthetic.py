"""Synthetic data: right by construction, the same for the same seed, no scene in both splits."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random

import pytest
from PIL import Image

from vlm_dist.data import synthetic
from vlm_dist.data.samples import parse_sample
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


def test_boxes_are_those_of_the_pixels(tmp_path):
    """By the drawn pixels: what differs from the background lies within the boxes, and reaches each edge."""
    made = synthesise(tmp_path, train=40, heldout=5, tasks=("boxes",), size=64, image_format="png")
    kinds = set()
    for raw in read_in_order([str(path) for path in made["boxes-train"]]):
        record = json.loads(raw["json"])
        kinds.add(record["kind"])
        sample = parse_sample(raw, max_image_pixels=10_000, caption_prompt="?")
        assert len(sample.objects) == len(record["objects"])
        for one in sample.objects:
            left, top = (32 * (middle > 32) for middle in one.centre)
            corner = sample.images[0].crop((left, top, left + 32, top + 32))
            ground, colour = sample.images[0].getpixel((32, 32)), COLOURS[one.label.split()[0]]  # no shape reaches the middle
            nearer = Image.new("L", corner.size)
            for place in range(32 * 32):
                at = divmod(place, 32)
                nearer.putpixel(at, 255 * (math.dist(corner.getpixel(at), colour) < math.dist(corner.getpixel(at), ground)))
            found = [edge + (left, top)[place % 2] for place, edge in enumerate(nearer.getbbox())]
            assert found == pytest.approx(one.box, abs=1.8 if one.label.endswith("triangle") else 1.01), record  # its tip is thin
    assert kinds == {"where", "point", "region", "detect"}
