"""`vlm-dist data pack` where one file alone does not tell: VQA's two files, splits in the records, pictures that a number names."""

from __future__ import annotations

import gzip
import json
import tarfile
import zipfile

import pytest

from tests.data.test_pack_layouts import jsons, pack, packed, picture
from vlm_dist.cli.main import main

PICTURES = {7: "COCO_train2014_000000000007.jpg", 9: "000000000009.jpg"}


def asked(number: int, image: int = 7, text: str = "Which colour?") -> dict:
    return {"image_id": image, "question": text, "question_id": number}


def annotated(number: int, *answers: str, image: int = 7) -> dict:
    given = [{"answer": one, "answer_confidence": "yes", "answer_id": place} for place, one in enumerate(answers, 1)]
    return {
        "question_id": number, "image_id": image, "multiple_choice_answer": answers[0], "answers": given, "question_type": "which",
        "answer_type": "other",
    }  # fmt: skip


@pytest.fixture
def vqa(tmp_path):
    (tmp_path / "train2014").mkdir()
    (tmp_path / "train2014" / PICTURES[7]).write_bytes(picture())
    (tmp_path / PICTURES[9]).write_bytes(picture("JPEG", (8, 8)))
    head = {"info": {}, "data_type": "mscoco", "data_subtype": "train2014"}
    (tmp_path / "q.json").write_text(json.dumps({**head, "questions": [asked(1), asked(2, 9), asked(3), asked(4, 8)]}))
    rows = [annotated(2, "blue", "navy", image=9), annotated(1, "red"), annotated(4, "x", image=8), annotated(5, "lost")]
    (tmp_path / "a.json").write_text(json.dumps({**head, "annotations": rows}))
    return tmp_path


@pytest.mark.parametrize(("source", "other"), [("q.json", "a.json"), ("a.json", "q.json")])
def test_questions_and_answers_in_two_files(vqa, source, other):
    assert pack(vqa / source, vqa / "out", "--annotations", str(vqa / other)) == 0
    made = {row["question_id"]: (row["messages"][-1]["content"], row["answers"], row["split"]) for row in jsons(vqa / "out")}
    assert made == {1: ("red", ["red"], "train2014"), 2: ("blue", ["blue", "navy"], "train2014")}
    sizes = {json.loads(raw["json"])["question_id"]: len(raw["jpg"]) for raw in packed(vqa / "out")}
    assert sizes == {1: len(picture()), 2: len(picture("JPEG", (8, 8)))}
    left = (vqa / "out" / "left_out.jsonl").read_text()
    assert "question_id 3 stands in 'q.json' alone" in left and "question_id 5 stands in 'a.json' alone" in left
    assert "picture number 8 (image_id) does not lie below" in left and "COCO_train2014_000000000008.jpg" in left
    (vqa / other).write_text((vqa / other).read_text() + "\n")
    assert pack(vqa / source, vqa / "out", "--annotations", str(vqa / other)) == 3  # not what was packed


@pytest.mark.parametrize(("name", "lacks"), [("q.json", "answers"), ("a.json", "questions")])
def test_half_of_two_files_is_named(vqa, name, lacks, capsys):
    assert pack(vqa / name, vqa / "out") == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"has no {lacks} (keys" in line and "--annotations ANNOTATIONS.json" in line
    (vqa / "other.json").write_text(json.dumps([{"name": "x"}]))
    assert pack(vqa / name, vqa / "out", "--annotations", str(vqa / "other.json")) == 3
    assert "have no number of the question in common" in capsys.readouterr().err


def test_a_okvqa(vqa):
    """Options by their letter; the free answers beside them are not what is said."""
    row = {
        "split": "train",
        "image_id": 9,
        "question_id": "22jb",
        "question": "What is it?",
        "choices": ["a box", "a cat", "a dog", "a hat"],
    }
    rest = {"correct_choice_idx": 1, "direct_answers": ["cat", "kitten"], "difficult_direct_answer": False, "rationales": ["It purrs."]}
    (vqa / "aokvqa.json").write_text(json.dumps([{**row, **rest}]))
    assert pack(vqa / "aokvqa.json", vqa / "out") == 0
    (made,) = jsons(vqa / "out")
    question, answer = made["messages"]
    assert question["content"] == "What is it?\nA. a box\nB. a cat\nC. a dog\nD. a hat" and answer["content"] == "B"
    assert made["answers"] == ["B"] and "jpg" in packed(vqa / "out")[0]


KARPATHY = {
    "images": [
        {"filepath": "train2014", "filename": PICTURES[7], "split": split, "sentences": [{"raw": f"{split} picture"}], "cocoid": 7}
        for split in ("train", "restval", "val", "test")
    ],
    "dataset": "coco",
}


def test_a_split_in_the_records(vqa, capsys):
    (vqa / "dataset_coco.json").write_text(json.dumps(KARPATHY))

    def captions(out: str, *more: str) -> list[str]:
        assert pack(vqa / "dataset_coco.json", vqa / out, *more) == 0
        return [row["caption"] for row in jsons(vqa / out)]

    assert captions("one", "--split", "train") == ["train picture"]
    assert captions("two", "--split", "train,restval") == ["train picture", "restval picture"]
    capsys.readouterr()
    assert len(captions("all")) == 4
    assert "records of several splits are packed together: restval (1), test (1), train (1), val (1); --split" in capsys.readouterr().out
    assert pack(vqa / "dataset_coco.json", vqa / "no", "--split", "dev") == 3
    assert "has no split 'dev'; it has train (1), restval (1)" in capsys.readouterr().err
    (vqa / "plain.json").write_text(json.dumps([{"image": PICTURES[9], "caption": "c"}]))
    assert pack(vqa / "plain.json", vqa / "no", "--split", "train") == 3
    assert "has no splits, neither by name nor in a key 'split'" in capsys.readouterr().err
    assert pack(vqa / "one" / "train-000000.tar", vqa / "no", "--split", "train") == 3
    assert "found with tars, which have no splits" in capsys.readouterr().err


def test_a_split_in_a_column(vqa, capsys):
    import pyarrow
    from pyarrow import parquet

    rows = [{"image": {"bytes": picture(), "path": None}, "caption": f"c{n}", "split": "train" if n % 2 else "test"} for n in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), vqa / "flickr30k.parquet", row_group_size=1)
    assert pack(vqa / "flickr30k.parquet", vqa / "out", "--split", "train", "--processes", "2", "--shard-size", "1") == 0
    assert [row["caption"] for row in jsons(vqa / "out")] == ["c1", "c3"]
    import datasets

    table = datasets.Dataset.from_list([{**row, "image": row["image"]["bytes"]} for row in rows])
    datasets.DatasetDict({"test": table}).save_to_disk(vqa / "saved")
    assert pack(vqa / "saved", vqa / "hub", "--split", "train") == 0
    assert [row["caption"] for row in jsons(vqa / "hub")] == ["c1", "c3"]
    assert pack(vqa / "saved", vqa / "no", "--split", "dev") == 3 and "no split 'dev'" in capsys.readouterr().err


@pytest.fixture
def odd(tmp_path):
    """Files that are no shards and no records."""
    (tmp_path / "p.jpg").write_bytes(picture())
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as file, tarfile.open(tmp_path / "plain.dat", "w") as plain:
        for name in ("p.jpg", "p.txt"):
            (tmp_path / "p.txt").write_text("A box.")
            file.add(tmp_path / name, name)
            plain.add(tmp_path / name, name)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("p.txt", "x")
    (tmp_path / "a.tar.bz2").write_bytes(b"BZh9" + bytes(600))
    (tmp_path / "r.json").write_text(json.dumps([{"image": "p.jpg", "caption": "c"}]) + " " * 600)
    return tmp_path


WHAT = {
    "a.tar.gz": (
        "is compressed; unpack it (gunzip -k",
        "is compressed, and samples are read at their places in a plain tar; unpack it: gunzip",
    ),
    "a.tar.bz2": ("is compressed; unpack it (bunzip2 -k", "unpack it: bunzip2 -k"),
    "a.zip": ("is a zip file; unpack it into a folder, and give the folder", "is a zip file; unpack it, and write shards of the folder"),
    "p.jpg": ("is a JPEG; give the folder of pictures and texts", "is a JPEG; write shards of pictures and their texts"),
}


@pytest.mark.parametrize("name", WHAT)
def test_what_is_no_source_and_no_shard(odd, name, capsys):
    assert pack(odd / name, odd / "out") == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert WHAT[name][0] in line
    assert main(["data", "verify", "--json", str(odd / name)]) == 3
    assert WHAT[name][1] in capsys.readouterr().out


def test_records_in_the_place_of_shards_and_a_tar_of_another_name(odd, capsys):
    assert main(["data", "verify", "--json", str(odd / "r.json")]) == 3
    assert "write shards of them: vlm-dist data pack" in capsys.readouterr().out
    assert pack(odd / "plain.dat", odd / "out") == 0 and jsons(odd / "out") == [{"caption": "A box."}]
    (odd / "r.jsonl.gz").write_bytes(gzip.compress(b'{"image": "p.jpg", "caption": "c"}'))
    assert pack(odd / "r.jsonl.gz", odd / "zipped") == 0 and jsons(odd / "zipped") == [{"caption": "c"}]
