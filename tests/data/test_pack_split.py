"""Held out by what pictures show; and the same call a second time."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFilter

from vlm_dist.cli.main import main
from vlm_dist.data.alike import groups, look_at
from vlm_dist.data.samples import parse_sample
from vlm_dist.data.shards import read_in_order


def drawn(number: int) -> Image.Image:
    """A picture of its own for each number: shapes on white, as clip art is."""
    picture = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(picture)
    chance = random.Random(number)
    for _ in range(4):
        x, y, side = chance.randrange(60), chance.randrange(60), chance.randrange(12, 36)
        shape = draw.ellipse if chance.random() < 0.5 else draw.rectangle
        shape((x, y, x + side, y + side), fill=tuple(chance.randrange(200) for _ in range(3)))
    return picture


def test_what_looks_alike():
    """Scaled, encoded anew or blurred a little it is the same picture; others are not, and plain colours are told apart."""
    pictures = [drawn(number) for number in range(150)]
    worse = io.BytesIO()
    pictures[0].save(worse, "JPEG", quality=40)
    changed = [pictures[0].resize((61, 61)), Image.open(worse), pictures[0].filter(ImageFilter.GaussianBlur(1))]
    plain = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "white", "black")]
    shown = [[look_at(picture)] for picture in (*pictures, *changed, *plain)]
    near = groups(shown, near=True)
    assert near[150:153] == [0, 0, 0]
    assert near[:150] == list(range(150)) and near[153:] == list(range(153, 157))
    assert groups(shown) == list(range(157))  # no two have the same pixels


def test_records_are_joined_through_their_pictures():
    one, two, three = (look_at(drawn(number)) for number in range(3))
    assert groups([[one], [two], [one, three], [], [three, "address"], ["address"], ["other"]]) == [0, 1, 0, 3, 0, 0, 6]


@pytest.fixture
def clip_art(tmp_path) -> Path:
    """40 pictures under 80 names: each lies there as PNG and, in another folder, as BMP; and in half as many again scaled."""
    for folder in ("png", "bmp", "small"):
        (tmp_path / folder).mkdir()
    records = []
    for number in range(40):
        picture, answer = drawn(number), f"number {number}"
        picture.save(tmp_path / "png" / f"{number}.png")
        picture.save(tmp_path / "bmp" / f"copy-{number}.bmp")
        records += [{"image": f"png/{number}.png", "caption": answer}, {"image": f"bmp/copy-{number}.bmp", "caption": f"a {answer}"}]
        if number % 2:
            picture.resize((73, 73)).save(tmp_path / "small" / f"{number}.png")
            records.append({"image": f"small/{number}.png", "caption": answer})
    (tmp_path / "records.json").write_text(json.dumps(records))
    return tmp_path / "records.json"


def said(folder: Path, part: str) -> list[int]:
    """The numbers that the captions of a part name."""
    samples = read_in_order(sorted(map(str, folder.glob(f"{part}-*.tar"))))
    texts = [parse_sample(raw, max_image_pixels=10**6, caption_prompt="?").messages[-1]["content"][0]["text"] for raw in samples]
    return [int(text.split()[-1]) for text in texts]


def test_held_out_by_content(clip_art, tmp_path, capsys):
    """One picture under two names lies in one part; with --dedup also a smaller copy, whose record says nothing new."""
    assert main(["data", "pack", str(clip_art), str(tmp_path / "same"), "--heldout", "20"]) == 0
    told = capsys.readouterr().out
    assert "80 records share 40 pictures (what has the same pixels is one picture)" in told
    train, apart = said(tmp_path / "same", "train"), said(tmp_path / "same", "heldout")
    assert len(train) + len(apart) == 100 and 20 <= len(apart) <= 22
    pairs = set(train) & set(apart)
    assert all(number % 2 for number in pairs)  # only scaled copies, which have other pixels
    assert main(["data", "pack", str(clip_art), str(tmp_path / "alike"), "--heldout", "20", "--dedup"]) == 0
    told = capsys.readouterr().out
    assert "100 records share 40 pictures (what looks alike is one picture)" in told and "20 records left out" in told
    train, apart = said(tmp_path / "alike", "train"), said(tmp_path / "alike", "heldout")
    assert len(train) + len(apart) == 80 and not set(train) & set(apart)
    reasons = [json.loads(line) for line in (tmp_path / "alike" / "left_out.jsonl").read_text().splitlines()]
    assert len(reasons) == 20 and reasons[0]["reason"].startswith("it says what record 2 says of a picture that looks alike")


def test_the_same_call_again(clip_art, tmp_path, capsys):
    """It finds what it made; a shard that has gone since is made again; a source that has changed is another call."""
    command = ["data", "pack", str(clip_art), str(tmp_path / "out"), "--heldout", "9", "--shard-size", "30"]
    assert main(command) == 0
    first = capsys.readouterr().out
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").glob("*.tar")}
    assert main(command) == 0
    again = capsys.readouterr().out
    assert "nothing to do" in again and [line for line in again.splitlines() if "samples in" in line] == [
        line for line in first.splitlines() if "samples in" in line
    ]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    gone = tmp_path / "out" / "train-000001.tar"
    gone.unlink()
    assert main(command) == 0 and gone.read_bytes() == before[gone][1]
    clip_art.write_text(json.dumps(json.loads(clip_art.read_text())[:-4]))
    assert main(command) == 3
    assert "of another call (bytes: " in capsys.readouterr().err
    for spoilt in ("[]", "{}", "{"):
        (tmp_path / "out" / "packed.json").write_text(spoilt)
        assert main(command) == 3
        assert "is there already, of another call" in capsys.readouterr().err


def test_several_files_of_a_pattern_that_change(clip_art, tmp_path, capsys):
    rows = json.loads(clip_art.read_text())
    for number in range(2):
        (tmp_path / f"part-{number}.json").write_text(json.dumps(rows[number::2]))
    command = ["data", "pack", str(tmp_path / "part-*.json"), str(tmp_path / "out"), "--images", str(clip_art.parent)]
    assert main(command) == 0 and main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "part-1.json").write_text(json.dumps(rows[3::2]))
    assert main(command) == 3
    assert "of another call (bytes: " in capsys.readouterr().err
