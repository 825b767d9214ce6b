"""Records as people have them, packed by the command; read back as training reads them."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import losses_of, write_config
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.data import pack_records
from vlm_dist.data.samples import Sample, parse_sample
from vlm_dist.data.shards import read_in_order, write_shards

COUNT = 8


def picture(number: int, kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), (20 * number, 40, 60)).save(data, kind)
    return data.getvalue()


def llava(number: int) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhich one?"}, {"from": "gpt", "value": f"Number {number}."}]
    return {"id": f"a.b/{number}", "image": f"{number}.jpg", "conversations": turns}


def chat(number: int) -> dict:
    asked = [{"type": "image", "image": f"{number}.jpg"}, {"type": "text", "text": "Which one?"}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": f"Number {number}."}]}


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    return folder


def write_source(form: str, images: Path) -> Path:
    beside = images.parent / "source"
    if form == "llava":
        beside = beside.with_suffix(".json")
        beside.write_text(json.dumps([llava(number) for number in range(COUNT)]))
    elif form == "messages":
        beside = beside.with_suffix(".jsonl")
        beside.write_text("\n".join(json.dumps(chat(number)) for number in range(COUNT)) + "\n\n")
    elif form == "parquet":
        import pyarrow
        from pyarrow import parquet

        beside = beside.with_suffix(".parquet")
        turns = [[{"role": "user", "content": "Which one?"}, {"role": "assistant", "content": f"Number {n}."}] for n in range(COUNT)]
        cells = [{"bytes": picture(n), "path": None} for n in range(COUNT)]
        parquet.write_table(pyarrow.table({"messages": turns, "image": cells}), beside)
    elif form == "texts":
        for number in range(COUNT):
            (images / f"{number}.txt").write_text(f"Number {number}.\n")
        beside = images
    else:
        rows = [{"file_name": f"{number}.jpg", "text": f"Number {number}."} for number in range(COUNT)]
        with (images / f"metadata.{form}").open("w", newline="") as file:
            if form == "csv":
                table = csv.DictWriter(file, ["file_name", "text"])
                table.writeheader()
                table.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        beside = images
    return beside


def pack(source: Path, out: Path, images: Path, *more: str) -> int:
    return main(["data", "pack", str(source), str(out), "--images", str(images), *more])


def read(out: Path, split: str = "train") -> list[Sample]:
    raws = list(read_in_order([str(path) for path in sorted(out.glob(f"{split}-*.tar"))]))
    return [parse_sample(raw, max_image_pixels=10_000, caption_prompt="Which one?") for raw in raws]


@pytest.mark.parametrize("form", ["llava", "messages", "parquet", "texts", "csv", "jsonl"])
def test_each_form_gives_the_same_samples(form, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert pack(write_source(form, images), out, images, "--shard-size", "3") == 0
    assert "train        8 samples in 3 shards" in capsys.readouterr().out
    samples = read(out)
    assert len(samples) == COUNT and not (out / "left_out.jsonl").exists()
    for number, sample in enumerate(samples):
        asked, said = sample.messages
        assert [part["type"] for part in asked["content"]] == ["image", "text"] and asked["content"][1]["text"] == "Which one?"
        assert said["content"] == [{"type": "text", "text": f"Number {number}."}]
    raws = read_in_order([str(out / "train-000000.tar")])
    assert [raw["jpg"] for raw in raws] == [picture(number) for number in range(3)]  # the files' own bytes


def test_several_pictures_and_none(images, tmp_path):
    (images / "0.jpg").write_bytes(picture(0, "PNG"))
    turns = [{"role": "user", "content": "Compare."}, {"role": "assistant", "content": "Both."}]
    (tmp_path / "s.jsonl").write_text(
        json.dumps({"images": ["0.jpg", "1.jpg"], "messages": turns}) + "\n" + json.dumps({"messages": turns})
    )
    assert pack(tmp_path / "s.jsonl", tmp_path / "out", images) == 0
    assert [len(sample.images) for sample in read(tmp_path / "out")] == [2, 0]
    (first, _) = read_in_order([str(tmp_path / "out" / "train-000000.tar")])
    assert first["0.png"] == picture(0, "PNG") and first["1.jpg"] == picture(1)


def test_what_training_would_refuse_is_left_out_by_name(images, tmp_path, capsys):
    (images / "5.jpg").write_bytes(b"GIF89a")
    records = [llava(number) for number in range(COUNT)] + [3, {"image": "0.jpg"}, {**llava(9), "image": ["0.jpg", "1.jpg"]}, llava(77)]
    (tmp_path / "s.json").write_text(json.dumps(records))
    assert pack(tmp_path / "s.json", tmp_path / "out", images) == 0
    assert "5 records left out" in capsys.readouterr().out and len(read(tmp_path / "out")) == 7
    reasons = {row["record"]: row["reason"] for row in map(json.loads, (tmp_path / "out" / "left_out.jsonl").read_text().splitlines())}
    assert set(reasons) == {5, 8, 9, 10, 11} and "5.jpg: a GIF; damaged" in reasons[5] and "no text" in reasons[9]
    assert "speaks of 1 pictures, the sample has 2" in reasons[10] and "'77.jpg' cannot be read below" in reasons[11]


def test_held_out_samples_of_one_picture_stay_together(images, tmp_path):
    records = [llava(number % 4) for number in range(40)]
    (tmp_path / "s.json").write_text(json.dumps(records))
    for name in ("one", "two"):
        assert pack(tmp_path / "s.json", tmp_path / name, images, "--heldout", "10", "--limit", "5") == 0
    kept, apart = read(tmp_path / "one"), read(tmp_path / "one", "heldout")
    assert (len(kept), len(apart)) == (5, 10)
    said = [{sample.messages[1]["content"][0]["text"] for sample in part} for part in (kept, apart)]
    assert len(said[1]) == 1 and not said[0] & said[1]
    assert [path.read_bytes() for path in sorted((tmp_path / "one").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "two").iterdir())
    ]


def test_a_picture_that_is_cut_short_is_left_out(images, tmp_path):
    (images / "2.jpg").write_bytes(picture(2)[:-60])
    assert pack(write_source("llava", images), tmp_path / "out", images) == 0
    (problem,) = map(json.loads, (tmp_path / "out" / "left_out.jsonl").read_text().splitlines())
    assert problem["record"] == 2 and "cannot be decoded" in problem["reason"] and len(read(tmp_path / "out")) == 7


def test_a_caption_may_hold_a_line_break_but_must_be_text(images, tmp_path, capsys):
    (images / "metadata.csv").write_text('file_name,text\n0.jpg,"two\nlines"\n')
    assert pack(images, tmp_path / "out", images) == 0
    assert read(tmp_path / "out")[0].messages[1]["content"][0]["text"] == "two\nlines"
    (images / "metadata.csv").unlink()
    (images / "0.txt").write_bytes(b"\xff\xfe\xff")
    assert pack(images, tmp_path / "new", images) == 3 and "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "{}", "holds no list"),
        ("a.json", "[", "cannot be read: Expecting value"),
        ("a.json", "[]", "holds no record"),
        ("a.json", "[1, 2]", "none of the 2 records can be used; the first: the record is 1; expected an object"),
        ("a.jsonl", '{"messages": []}\nnot json\n', "line 2: "),
        ("a.parquet", "no parquet", "cannot be read"),
        ("metadata.jsonl", "3\n", "expected file_name and text (or caption), found 3"),
        ("metadata.csv", "name,words\na,b\n", "expected file_name and text (or caption), found name, words"),
    ],
)
def test_a_source_that_cannot_be_used_says_why(tmp_path, capsys, name, text, words):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_text(text)
    source = tmp_path / "source" if name.startswith("metadata") else tmp_path / "source" / name
    assert pack(source, tmp_path / "out", tmp_path) == 3
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not list((tmp_path / "out").glob("*.tar"))


def test_what_is_there_is_not_overwritten(images, tmp_path, capsys):
    source = write_source("llava", images)
    assert pack(source, tmp_path / "out", images) == 0 and pack(source, tmp_path / "out", images, "--seed", "1") == 3
    assert "train-000000.tar is there already, of another call (seed: 0 -> 1)" in capsys.readouterr().err
    assert pack(tmp_path / "nothing.json", tmp_path / "new", images) == 3
    assert pack(source, tmp_path / "new", images, "--heldout", "8") == 3 and not (tmp_path / "new").exists()


def test_a_source_written_anew_with_the_same_words_is_the_same(images, tmp_path, capsys):
    source = write_source("llava", images)
    assert pack(source, tmp_path / "out", images) == 0
    source.write_bytes(content := source.read_bytes())
    os.utime(source, (1, 1))
    assert pack(source, tmp_path / "out", images) == 0 and "nothing to do" in capsys.readouterr().out
    source.write_bytes(content + b" ")
    assert pack(source, tmp_path / "out", images) == 3 and "of another call (" in capsys.readouterr().err


@pytest.mark.slow
def test_packed_records_train(images, tmp_path, settings):
    assert pack(write_source("messages", images), tmp_path / "out", images, "--heldout", "2") == 0
    settings["data"] |= {"train": f"{tmp_path}/out/train-*.tar", "heldout": f"{tmp_path}/out/heldout-*.tar"}
    assert train(load_config(write_config(settings, tmp_path)))["ended"] == "finished"
    assert len(losses_of(Path(settings["output_dir"]) / "tiny")) == 4


def samples_of(out: Path, split: str = "train") -> list[dict]:
    return list(read_in_order(sorted(str(path) for path in out.glob(f"{split}-*.tar"))))


def test_tars_that_others_made(tmp_path, capsys):
    """img2dataset's form: a caption in txt, its own facts in json; one picture is broken, one text is missing."""
    rows = [
        {"__key__": f"{n:09d}", "jpg": picture(n), "txt": f"caption {n}".encode(), "json": json.dumps({"url": n}).encode()}
        for n in range(9)
    ]
    rows[4]["jpg"] = b"no picture"
    del rows[6]["txt"]
    write_shards(tmp_path, "cc", rows, samples_per_shard=4)
    assert main(["data", "pack", f"{tmp_path}/cc-*.tar", str(tmp_path / "out"), "--shard-size", "5", "--processes", "2"]) == 0
    found = samples_of(tmp_path / "out")
    assert [json.loads(raw["json"]) for raw in found] == [{"url": n, "caption": f"caption {n}"} for n in (0, 1, 2, 3, 5, 7, 8)]
    assert [raw["jpg"] for raw in found] == [rows[n]["jpg"] for n in (0, 1, 2, 3, 5, 7, 8)]
    assert "2 records left out" in capsys.readouterr().out


def test_a_data_set_of_datasets(tmp_path, capsys):
    import datasets

    rows = {
        "image": [{"bytes": picture(n), "path": None} for n in range(6)],
        "text": [f"caption {n}" for n in range(6)],
        "extra": list(range(6)),
    }
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "extra": datasets.Value("int64")})
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, kinds), "test": datasets.Dataset.from_dict(rows, kinds)})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert main(["data", "pack", str(tmp_path / "saved"), str(tmp_path / "out"), "--shard-size", "3", "--split", "test"]) == 0
    found = samples_of(tmp_path / "out")
    assert [raw["jpg"] for raw in found] == [picture(n) for n in range(6)]  # as they were stored
    assert json.loads(found[2]["json"]) == {"extra": 2, "caption": "caption 2"}
    assert main(["data", "pack", str(tmp_path / "saved"), str(tmp_path / "no"), "--split", "valid"]) == 3
    assert "has no split 'valid'; it has train, test" in capsys.readouterr().err
    assert main(["data", "pack", "nobody/nothing", str(tmp_path / "no")]) == 3
    assert "no data set that can be loaded" in capsys.readouterr().err


def test_pictures_made_smaller_and_encoded_anew(tmp_path):
    large, small = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (300, 200), "red").save(large, "PNG")
    Image.new("RGB", (30, 20), "blue").save(small, "PNG")
    for name, data in (("large", large), ("small", small)):
        (tmp_path / f"{name}.png").write_bytes(data.getvalue())
        (tmp_path / f"{name}.txt").write_text(name)
    assert main(["data", "pack", str(tmp_path), str(tmp_path / "a"), "--max-side", "100"]) == 0
    first, second = samples_of(tmp_path / "a")
    assert Image.open(io.BytesIO(first["png"])).size == (100, 67) and second["png"] == small.getvalue()
    assert main(["data", "pack", str(tmp_path), str(tmp_path / "b"), "--reencode", "webp", "--quality", "50"]) == 0
    assert [Image.open(io.BytesIO(raw["webp"])).size for raw in samples_of(tmp_path / "b")] == [(300, 200), (30, 20)]


def test_packing_goes_on_where_it_was_killed(tmp_path, monkeypatch, capsys):
    records = [{"image": f"{n}.jpg", "caption": f"caption {n}"} for n in range(20)]
    for n in range(20):
        (tmp_path / f"{n}.jpg").write_bytes(picture(n) if n != 3 else b"broken")
    source, out = tmp_path / "r.json", tmp_path / "out"
    source.write_text(json.dumps(records))
    command = ["data", "pack", str(source), str(out), "--shard-size", "4", "--processes", "1"]
    assert main(["data", "pack", str(source), str(tmp_path / "whole"), *command[4:]]) == 0
    written, write = [], pack_records.write_shard

    def dies(path, samples):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, samples)

    monkeypatch.setattr(pack_records, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        pack_records.pack_records(source, out, samples_per_shard=4, processes=1)
    assert main(["data", "pack", str(source), str(out), "--shard-size", "5"]) == 3  # another call
    assert "is there already, of another call" in capsys.readouterr().err
    written.clear()
    assert main(command) == 0
    assert written == ["train-000003.tar", "train-000004.tar"]
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (out / ".unfinished").exists()
