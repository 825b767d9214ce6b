"""The demonstration on real parts and pictures: its questions, its conversion, its verdict; and the whole script, at small size."""

from __future__ import annotations

import colorsys
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts" / "real_pictures"))

import parts  # pyright: ignore[reportMissingImports]
import questions  # pyright: ignore[reportMissingImports]
import verdict  # pyright: ignore[reportMissingImports]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A package of 160 drawn emoji in four groups, and 20 pairs of a man and a woman."""
    folder = tmp_path_factory.mktemp("real")
    pictures = folder / "packages" / "emoji" / "img" / "twitter" / "64"
    pictures.mkdir(parents=True)
    rng, entries = random.Random(1), []
    groups = ["Animals & Nature", "Food & Drink", "Flags", "Objects"]
    codes = [(f"1F{number:03X}", groups[number % 4]) for number in range(160)]
    codes += [(f"{sex}-200D-2{number:03X}", "People & Body") for number in range(20) for sex in ("1F468", "1F469")]
    for number, (code, group) in enumerate(codes):
        picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        fill = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(rng.random(), 1, 0.9))
        corner = rng.randrange(24), rng.randrange(24)
        ImageDraw.Draw(picture).rectangle((*corner, corner[0] + rng.randrange(8, 40), corner[1] + rng.randrange(8, 40)), fill=fill)
        picture.save(pictures / f"{code}.png")
        name = "".join(chr(97 + int(digit)) for digit in str(number)).upper()
        entries.append({"name": name, "unified": code, "image": f"{code}.png", "category": group, "has_img_twitter": True})
    (pictures.parents[2] / "emoji.json").write_text(json.dumps(entries))
    subprocess.run([sys.executable, questions.__file__, folder, "--heldout", "40", "--asked", "12"], check=True)
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_one_text_has_four_right_answers_of_four_pictures(folder, name):
    asked = defaultdict(list)
    for record in read(folder / f"{name}.jsonl"):
        if record["kind"] != "tell":
            asked[record["messages"][1]["content"]].append((record["image"], record["messages"][2]["content"]))
    assert asked
    for text, pairs in asked.items():
        pictures, answers = zip(*pairs, strict=True)
        options = text.partition(": ")[2].rstrip("?").replace(" or ", ", ").split(", ")
        assert len(pairs) % 4 == 0 and set(answers) == set(options) and len(set(options)) == 4, text
        assert len(set(pictures)) == len(pictures), text
        assert all(answers.count(option) * 4 == len(answers) for option in options), text


def test_nothing_that_looks_like_a_held_out_picture_is_trained_on(folder):
    emoji = questions.read_emoji(folder / "packages" / "emoji", folder / "pictures")
    train, heldout, left_out = questions.split(emoji, 40, random.Random(3))
    assert len(train) + len(heldout) + left_out == len(emoji) == 200 and len(heldout) == 40 and left_out
    assert not {one.family for one in train} & {one.family for one in heldout}
    for one in train:
        assert min(abs(one.small - other.small).mean() for other in heldout) >= questions.NEAR
    named = [{record["image"] for record in read(folder / f"{name}.jsonl")} for name in ("train", "heldout")]
    assert named[0] and named[1] and not named[0] & named[1]


def test_the_grey_questions_are_the_held_out_ones(folder):
    seen, grey = read(folder / "heldout.jsonl"), read(folder / "grey.jsonl")
    assert [record["messages"] for record in seen] == [record["messages"] for record in grey]
    assert {record["image"] for record in grey} == {"grey.png"}
    assert Image.open(folder / "pictures" / "grey.png").getcolors() == [(64 * 64, (128, 128, 128))]


@pytest.mark.parametrize(("name", "said"), [
    ("WOMANS SANDAL", "womans sandal"), ("CAT FACE", "cat"), ("FAMILY: MAN, WOMAN, BOY", ""), ("SQUARED NEW", ""),
    ("Norfolk Island Flag", "norfolk island flag"), ("CLOCK FACE EIGHT-THIRTY", ""), ("A B C D E", ""),
])  # fmt: skip
def test_names(name, said):
    assert questions.spoken(name) == said


@pytest.mark.parametrize(("rgb", "colour"), [
    ((220, 30, 40), "red"), ((85, 172, 238), "blue"), ((255, 204, 77), "yellow"), ((119, 178, 85), "green"), ((102, 33, 19), "brown"),
    ((20, 20, 20), "black"), ((250, 250, 250), ""), ((150, 150, 150), "grey"), ((146, 102, 204), "purple"), ((244, 144, 12), "orange"),
])  # fmt: skip
def test_colours(rgb, colour):
    """White is none: the pictures lie on white."""
    assert questions.colour_of(Image.new("RGBA", (8, 8), (*rgb, 255))) == colour


def lite0_weights() -> dict:
    """Random, with the names of efficientnet_lite_pytorch's model."""
    import torch
    from transformers import EfficientNetModel

    torch.manual_seed(0)
    state = EfficientNetModel(parts.lite0_config()).state_dict()
    kept = {
        name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in state.items() if "squeeze" not in name
    }
    return kept | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def test_lite0_has_no_squeeze_and_excitation():
    """Each of transformers' layers for it gives what it got, bit by bit; every weight is in the model."""
    import torch

    weights = lite0_weights()
    model = parts.lite0(weights)
    seen = []
    for block in model.encoder.blocks:
        block.squeeze_excite.register_forward_hook(lambda module, inputs, output: seen.append(torch.equal(inputs[0], output)))
    with torch.no_grad():
        found = model(pixel_values=torch.randn(1, 3, 128, 128)).last_hidden_state
    assert found.shape == (1, 1280, 4, 4) and seen == [True] * 16
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items() if not name.startswith("_fc."))


def test_other_weights_are_refused():
    weights = lite0_weights()
    weights.pop("encoder.top_conv.weight")
    with pytest.raises(ValueError, match="expected the 294 of EfficientNet-Lite0"):
        parts.lite0(weights)


def test_the_verdict():
    lines = [{"step": step, "loss": 3.0 - step} for step in range(2)] + [{"eval": {}}]
    seen = {"exact_match": 0.5, "samples": 300, "by_kind": {"group": 0.6, "name": 0.4}}
    grey = {"exact_match": 0.24, "samples": 300, "by_kind": {"group": 0.25, "name": 0.23}}
    found = verdict.verdict(seen, grey, {"step": 2}, lines)
    assert found["standard_errors_above_chance"] == 10.0 and found["by_kind"]["name"] == {"held_out": 0.4, "no_picture": 0.23}
    assert verdict.told(found).endswith("10.0 standard errors above chance: it sees")
    blind = verdict.verdict(seen | {"exact_match": 0.3}, grey, {"step": 2}, lines)
    assert verdict.told(blind).endswith("no sight shown")


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif("REAL_PICTURES" not in os.environ, reason="fetches packages of 400 MB and trains on them; REAL_PICTURES=1 runs it")
def test_the_script_at_small_size(tmp_path):
    """Fetches packages by name, converts, packs, trains three steps, scores, and makes the page; then the same by Unsloth's names."""
    environment = os.environ | {"FOLDER": str(tmp_path), "RUN": str(tmp_path / "run")}
    done = subprocess.run(["scripts/real_pictures.sh", "--small"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "standard errors above chance" in done.stdout and (tmp_path / "run" / "report.html").exists()
    out = tmp_path / "python"
    command = [sys.executable, "scripts/real_pictures/python_way.py", tmp_path, out, "--steps", "2", "--batch", "2"]
    subprocess.run(command, cwd=ROOT, check=True)
    command = [sys.executable, "-m", "vlm_dist.cli.main", "eval", out, "--data", f"{tmp_path}/shards/heldout/*.tar", "--json"]
    scored = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert json.loads(scored.stdout)["samples"] == 16
