"""`vlm-dist data pack` on files, folders and tars as people have them: what is read, converted, told, and refused."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import layouts_page
from vlm_dist.cli.main import main
from vlm_dist.data.samples import outline, parse_sample
from vlm_dist.data.shards import read_in_order, write_shards

Q, A = "Which colour?", "red"


def picture(kind: str = "JPEG", size=(16, 12), **options) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, kind, **options)
    return data.getvalue()


def pack(source, out: Path, *more: str) -> int:
    return main(["data", "pack", str(source), str(out), "--processes", "1", *more])


def packed(out: Path, split: str = "train") -> list[dict]:
    return list(read_in_order(sorted(str(path) for path in out.glob(f"{split}-*.tar"))))


def jsons(out: Path) -> list[dict]:
    return [json.loads(raw["json"]) for raw in packed(out)]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "0.jpg").write_bytes(picture())
    return tmp_path


def test_the_table_in_the_docs_is_what_packing_makes():
    text = layouts_page.PAGE.read_text(encoding="utf-8")
    assert layouts_page.page(text) == text, "python scripts/layouts_page.py"


ROWS = [{"image": "0.jpg", "caption": f"caption {n}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", LINES),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.jsonl", "\n" + LINES.replace("\n", "\r\n\r\n")),
        ("a.jsonl", f"[{json.dumps(ROWS[0])}]\n[{json.dumps(ROWS[1])}, {json.dumps(ROWS[2])}]\n"),
        ("a.ndjson", LINES),
        ("odd name [1]%20.json", json.dumps({"data": ROWS})),
        ("a.json", json.dumps({"rows": [{"row": row} for row in ROWS]})),
        ("a.json", json.dumps({f"id{n}": row for n, row in enumerate(ROWS)})),
        ("a.json", json.dumps({key: {str(n): row[key] for n, row in enumerate(ROWS)} for key in ("image", "caption")})),
        ("a.csv", "image,caption\n" + "".join(f"0.jpg,caption {n}\n" for n in range(3))),
        ("a.csv", "image;caption\n" + "".join(f"0.jpg;caption {n}\n" for n in range(3))),
        ("a.tsv", "image\tcaption\n" + "".join(f"0.jpg\tcaption {n}\n" for n in range(3))),
        ("captions.txt", "image,caption\n" + "".join(f"0.jpg,caption {n}\n" for n in range(3))),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_content_decides(folder, name, text, encoding):
    (folder / name).write_text(text, encoding=encoding, newline="")
    assert pack(folder / name, folder / "out") == 0
    assert [row["caption"] for row in jsons(folder / "out")] == [f"caption {n}" for n in range(3)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.csv", "image_name| comment_number| comment\n0.jpg| 0| one\n0.jpg| 1| two\n"),
        ("x.token", "0.jpg#0\tone\n0.jpg#1\ttwo\n"),
        ("table.json", json.dumps({"image": ["0.jpg", "0.jpg"], "caption": [["one", "two"], ["one", "two"]]})),
    ],
)
def test_captions_of_one_picture(folder, name, text):
    (folder / name).write_text(text)
    assert pack(folder / name, folder / "out") == 0 and jsons(folder / "out")[0] == {"captions": ["one", "two"]}


def test_a_first_look_is_shown(folder, capsys):
    rows = [{"image": "0.jpg", "query": Q, "label": [A], "human": 1}] * 3 + [{"foo": 1}]
    (folder / "a.json").write_text(json.dumps(rows))
    assert pack(folder / "a.json", folder / "out", "--dry-run") == 0 and not (folder / "out").exists()
    out = capsys.readouterr().out
    assert "4 records" in out and "question and answer (3); not recognised (1): no text in a layout that is known; its keys are foo" in out
    assert "sample: user: 'Which colour?' | assistant: 'red' | 1 pictures: '0.jpg' | also human, answers" in out and out.count("\n") == 3
    assert pack(folder / "a.json", folder / "out") == 0
    assert "question and answer (3)" in (out := capsys.readouterr().out) and "1 records left out" in out


def test_what_is_not_recognised_names_keys_and_layouts_in_one_line(folder, capsys):
    (folder / "a.json").write_text(json.dumps([{"foo": 1, "bar": 2}] * 200))
    assert pack(folder / "a.json", folder / "out") == 3 and not (folder / "out").exists()
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "none of the 200 records (100 looked at)" in error
        and "its keys are foo, bar; known are messages" in error
    )
    assert pack(folder / "a.json", folder / "out", "--question", "foo", "--answer", "baz") == 3
    assert "the record has no 'baz'; its keys are foo, bar" in capsys.readouterr().err


def test_columns_by_name(folder):
    (folder / "a.csv").write_text("pic,q,a\n0.jpg,Which colour?,red\n")
    assert pack(folder / "a.csv", folder / "out", "--question", "q", "--answer", "a", "--image", "pic") == 0
    (row,) = jsons(folder / "out")
    assert [turn["content"] for turn in row["messages"]] == [Q, A] and row["answers"] == [A] and "jpg" in packed(folder / "out")[0]


def test_other_formats_are_converted_and_told(folder, capsys):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    (folder / "named.jpg").write_bytes(picture("BMP"))
    wide = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    wide.save(folder / "wide.tiff")
    (folder / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    names = ["a.gif", "named.jpg", "wide.tiff", "0.jpg", "x.heic"]
    (folder / "a.json").write_text(json.dumps([{"image": name, "caption": "c"} for name in names]))
    assert pack(folder / "a.json", folder / "out") == 0
    out = capsys.readouterr().out
    assert "3 pictures converted to png: 1 BMP, 1 GIF, 1 TIFF" in out and "1 pictures have several frames or pages; the first" in out
    assert "1 records have a HEIC or AVIF picture that cannot be read here: `pip install 'vlm_dist[heif]'`" in out
    assert "pip install 'vlm_dist[heif]'` (or pillow-heif)" in (folder / "out" / "left_out.jsonl").read_text()
    raws = packed(folder / "out")
    assert Image.open(io.BytesIO(raws[0]["png"])).getpixel((0, 0)) == (255, 0, 0) and raws[3]["jpg"] == (folder / "0.jpg").read_bytes()
    assert Image.open(io.BytesIO(raws[2]["png"])).getpixel((0, 0)) == (156, 156, 156)
    assert pack(folder / "a.json", folder / "jpg", "--reencode", "jpg") == 0 and all("jpg" in raw for raw in packed(folder / "jpg"))


def test_one_odd_line_does_not_end_the_run(folder, capsys):
    good = json.dumps({"image": "0.jpg", "caption": "fine"}).encode()
    bad = [
        b"{not json",
        b'{"image": "0.jpg", "caption": "\xff"}',
        json.dumps({"image": "0.jpg", "caption": "\ud83d"}).encode(),
        b"[" * 5000,
    ]
    (folder / "a.jsonl").write_bytes(b"\n".join([good, *bad, good]) + b"\n")
    assert pack(folder / "a.jsonl", folder / "out") == 0 and len(jsons(folder / "out")) == 2
    reasons = [json.loads(line)["reason"] for line in (folder / "out" / "left_out.jsonl").read_text().splitlines()]
    assert (
        reasons[0].startswith("'a.jsonl' line 2: ") and "is no UTF-8" in reasons[1] and "surrogate" in reasons[2] and "line 5" in reasons[3]
    )
    (folder / "a.csv").write_bytes(b'image,caption\n0.jpg,a\n0.jpg,a,b,c\n0.jpg,\xe9\n0.jpg,"b\nc"\n')
    assert pack(folder / "a.csv", folder / "csv") == 0 and [row["caption"] for row in jsons(folder / "csv")] == ["a", "b\nc"]
    reasons = (folder / "csv" / "left_out.jsonl").read_text()
    assert "'a.csv' line 3: 4 cells; expected 2: image, caption" in reasons and "line 4: it is no UTF-8" in reasons


def test_vlmevalkit_tables(folder):
    """Base64 larger than a cell may be by default; a picture may be another row's index."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8))
    noise.save(data := io.BytesIO(), "PNG")
    cell = base64.b64encode(data.getvalue()).decode()
    assert len(cell) > 200_000
    rows = [f"7\t{cell}\tWhich?\tx\ty\tA\tc", "8\t7\tAnd now?\tx\ty\tB\tc"]
    (folder / "a.tsv").write_text("\n".join(["index\timage\tquestion\tA\tB\tanswer\tcategory", *rows]) + "\n")
    assert pack(folder / "a.tsv", folder / "out") == 0
    assert [raw["png"] == data.getvalue() for raw in packed(folder / "out")] == [True, True]
    assert jsons(folder / "out")[1]["messages"][0]["content"] == "And now?\nA. x\nB. y" and jsons(folder / "out")[1]["category"] == "c"


def test_parquet_in_folders_and_globs(folder, capsys):
    import datasets

    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), "n": datasets.Value("int64")})
    made = datasets.Dataset.from_dict({"image": [{"bytes": picture(), "path": None}] * 6, "label": [0, 1] * 3, "n": list(range(6))}, kinds)
    (folder / "hub" / "data").mkdir(parents=True)
    for number, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]):
        part = made.select(range(2 * number, 2 * number + 2))
        part.to_parquet(str(folder / "hub" / "data" / f"{name}.parquet"), batch_size=1)
    assert pack(folder / "hub", folder / "out") == 0
    assert jsons(folder / "out") == [{"n": n, "caption": ("cat", "dog")[n % 2]} for n in range(4)]
    assert pack(folder / "hub", folder / "test", "--split", "test") == 0 and [row["n"] for row in jsons(folder / "test")] == [4, 5]
    assert main(["data", "pack", f"{folder}/hub/data/t*n-*.parquet", str(folder / "glob"), "--processes", "2", "--shard-size", "2"]) == 0
    assert [row["n"] for row in jsons(folder / "glob")] == [0, 1, 2, 3]
    capsys.readouterr()
    assert (
        pack(folder / "hub", folder / "none", "--split", "valid") == 3
        and "has no split 'valid'; it has test, train" in capsys.readouterr().err
    )
    assert pack(f"{folder}/no/*.parquet", folder / "none") == 3 and "no file matches" in capsys.readouterr().err


def test_folders(folder, capsys):
    for split, name in (("train", "hot dog"), ("train", "cat"), ("val", "cat")):
        (folder / "classes" / split / name).mkdir(parents=True)
        (folder / "classes" / split / name / "a [1] é.jpg").write_bytes(picture())
    assert pack(folder / "classes", folder / "out") == 0 and [row["caption"] for row in jsons(folder / "out")] == ["cat", "hot dog"]
    (folder / "beside").mkdir()
    for name, text in (
        ("a.txt", b"\xef\xbb\xbfA box.\r\n"),
        ("b.caption", b"B"),
        ("c.json", b'{"caption": ["x", "y"]}'),
        ("d.json", b'["x"]'),
    ):
        (folder / "beside" / name).write_bytes(text)
        (folder / "beside" / name).with_suffix(".png").write_bytes(picture("PNG"))
    (folder / "beside" / "e.gif").write_bytes(picture("GIF"))
    assert pack(folder / "beside", folder / "texts") == 0
    assert jsons(folder / "texts") == [{"caption": "A box."}, {"caption": "B"}, {"captions": ["x", "y"]}, {"caption": "x"}]
    assert "picture 'e.gif' has no text beside it; expected 'e.txt'" in (folder / "texts" / "left_out.jsonl").read_text()
    (folder / "splits" / "train").mkdir(parents=True)
    (folder / "splits" / "train" / "0.jpg").write_bytes(picture())
    (folder / "splits" / "train" / "metadata.csv").write_text("file_name,text\n0.jpg,below\n")
    assert pack(folder / "splits", folder / "below") == 0 and jsons(folder / "below") == [{"caption": "below"}]
    (folder / "meta").mkdir()
    (folder / "meta" / "0.jpg").write_bytes(picture())
    (folder / "meta" / "metadata.jsonl").write_text(json.dumps({"file_name": "0.jpg", "question": Q, "answer": A}))
    assert pack(folder / "meta", folder / "rows") == 0 and jsons(folder / "rows")[0]["answers"] == [A]


def test_tars_in_other_forms(folder):
    rows = [
        {"__key__": "a", "jpg": picture(), "text": b"\xef\xbb\xbfone"},
        {"__key__": "b", "gif": picture("GIF"), "caption": b"two"},
        {"__key__": "c", "png": picture("PNG"), "json": b'\xef\xbb\xbf{"caption": ["x", "y"], "image": "gone.jpg", "url": "https://x"}'},
        {"__key__": "d", "jpg": picture(), "json": json.dumps([{"role": "user", "content": Q}, {"role": "model", "content": A}]).encode()},
        {"__key__": "e", "jpg": picture(), "txt": b"\xff\xfa"},
    ]
    write_shards(folder / "tars", "x", rows, samples_per_shard=9)
    assert pack(folder / "tars", folder / "out") == 0
    one, two, three, four = jsons(folder / "out")
    assert (one, two, three) == ({"caption": "one"}, {"caption": "two"}, {"url": "https://x", "captions": ["x", "y"]})
    assert [turn["role"] for turn in four["messages"]] == ["user", "assistant"] and "png" in packed(folder / "out")[1]
    assert "e: " in (folder / "out" / "left_out.jsonl").read_text()


def test_coco(folder, capsys):
    coco = {
        "images": [
            {"id": 1, "file_name": "0.jpg", "width": 16, "height": 12},
            {"id": 2, "file_name": "none.jpg"},
            {"id": 3, "file_name": "3.jpg"},
        ],
        "annotations": [
            {"image_id": 1, "category_id": 5, "bbox": [1, 2, 4, 4.5], "segmentation": [[1]]},
            {"image_id": 1, "category_id": 5, "bbox": [0, 0, 8, 8], "iscrowd": 1},
            {"image_id": 9, "category_id": 5, "bbox": [0, 0, 8, 8]},
            {"image_id": 3, "category_id": 5, "bbox": [0, 0, 8, 8], "iscrowd": 1},
            {"image_id": 1, "category_id": 5, "bbox": [3, 3, 0, 2]},
        ],
        "categories": [{"id": 5, "name": "cat"}],
    }
    (folder / "i.json").write_text(json.dumps(coco))
    assert pack(folder / "i.json", folder / "out") == 0
    assert "1 boxes around crowds (iscrowd) are left out" in capsys.readouterr().out
    boxes = [{"bbox": [1, 2, 5, 6.5], "label": "cat"}]
    assert jsons(folder / "out") == [{"objects": boxes, "width": 16, "height": 12, "image_id": 1, "objects_size": [16, 12]}]
    left = (folder / "out" / "left_out.jsonl").read_text()
    assert "picture '3.jpg' has boxes around crowds (iscrowd) alone" in left
    assert "picture 'none.jpg' has no annotation" in left and "the picture '9', which 'images' does not have" in left
    assert "picture '1': a box is [3, 3, 0, 2], which is empty" in left
    assert (
        pack(folder / "i.json", folder / "small", "--max-side", "8") == 0
        and "1 records whose pictures were made smaller keep the numbers of their objects" in capsys.readouterr().out
    )
    (small,) = jsons(folder / "small")
    assert small["objects"] == boxes and small["objects_size"] == [16, 12]
    (raw,) = packed(folder / "small")
    found = outline(raw, max_image_pixels=10**6, caption_prompt="")
    assert found.sizes == [(8, 6)] and found.objects[0].points == ((0.5, 1.0), (2.5, 3.25))


def test_boxes_of_a_picture_that_was_larger_or_is_turned(folder):
    """COCO's width and height say what its boxes refer to."""
    turned = Image.new("RGB", (64, 48))
    turned.getexif()[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=turned.getexif())
    Image.new("RGB", (64, 48)).save(folder / "less.jpg")
    sizes = (("less.jpg", 128, 96), ("turned.jpg", 64, 48))
    images = [{"id": n, "file_name": name, "width": width, "height": height} for n, (name, width, height) in enumerate(sizes)]
    boxes = [{"image_id": number, "category_id": 5, "bbox": [4, 2, 40, 30]} for number in (0, 1)]
    (folder / "i.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "cat"}]}))
    assert pack(folder / "i.json", folder / "out") == 0
    less, upright = (outline(raw, max_image_pixels=10**6, caption_prompt="").objects[0].box for raw in packed(folder / "out"))
    assert less == (2, 1, 22, 16) and upright == (48 - 32, 4, 48 - 2, 44)


def test_the_index_of_a_part_says_which_picture(folder):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / name)
    content = [{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "text", "text": "Which?"}]
    said = {"role": "assistant", "content": [{"type": "text", "text": "blue, red"}]}
    (folder / "i.json").write_text(json.dumps([{"messages": [{"role": "user", "content": content}, said], "images": ["a.png", "b.png"]}]))
    assert pack(folder / "i.json", folder / "out") == 0
    (raw,) = packed(folder / "out")
    sample = parse_sample(raw, max_image_pixels=10**6, caption_prompt="")
    assert [image.getpixel((0, 0)) for image in sample.images] == [(0, 0, 255), (255, 0, 0)]


def test_addresses_are_named_and_tools_go_in(folder, capsys):
    turns = [{"role": "user", "content": Q}, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    turns += [{"role": "tool", "content": "3"}, {"role": "assistant", "content": A, "reasoning_content": "Hm.", "loss": False}]
    rows = [{"image": "http://127.0.0.1:9/a.jpg", "caption": "c"}, {"messages": turns, "tools": [{"name": "f"}]}]
    (folder / "a.json").write_text(json.dumps(rows))
    assert pack(folder / "a.json", folder / "out") == 0
    assert jsons(folder / "out") == [{"tools": [{"name": "f"}], "messages": turns}]
    assert "is not fetched; --fetch fetches" in (folder / "out" / "left_out.jsonl").read_text()
    assert pack(folder / "a.json", folder / "fetched", "--fetch") == 0
    assert "inside a network; `--fetch-private`" in (folder / "fetched" / "left_out.jsonl").read_text()


def test_what_is_never_opened_or_not_understood(folder, capsys):
    (folder / "refs.p").write_bytes(b"\x80\x04K\x01.")
    assert pack(folder / "refs.p", folder / "out") == 3 and "is a pickle, which could run any program" in capsys.readouterr().err
    (folder / "two").mkdir()
    for name in ("a.json", "b.json"):
        (folder / "two" / name).write_text(json.dumps(ROWS))
    assert pack(folder / "two", folder / "out") == 3 and "holds a.json, b.json; give one of them" in capsys.readouterr().err
    assert pack(f"{folder}/two/*.json", folder / "out", "--images", str(folder)) == 0 and len(jsons(folder / "out")) == 6
    assert main(["data", "pack", "--format", "flickr8k", "x", str(folder / "no"), "--dry-run"]) == 3


def test_bytes_beside_the_picture_are_left_out_and_told(folder, capsys):
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"image": {"bytes": picture(), "path": None}, "depth": picture("PNG"), "mask": {"bytes": picture("PNG"), "path": None}, "text": "a"}
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    assert pack(folder / "a.parquet", folder / "out") == 0 and jsons(folder / "out") == [{"caption": "a"}]
    out = capsys.readouterr().out
    assert "'depth' is left out of 1 records" in out and "'mask' is left out of 1 records" in out
    with tarfile.open(folder / "out" / "train-000000.tar") as tar:
        assert tar.getnames() == ["train-00000000.jpg", "train-00000000.json"]


def test_dotted_names_and_a_repeated_member_of_a_tar_are_told(folder):
    """One odd sample ends no packing; the reason names what was found and the rule."""
    jpg = (folder / "0.jpg").read_bytes()
    names = [("v1.0.jpg", jpg), ("v1.0.txt", b"a"), ("w.jpg", jpg), ("w.jpg", jpg), ("w.txt", b"b"), ("x.jpg", jpg), ("x.txt", b"c")]
    with tarfile.open(folder / "odd.tar", "w") as tar:
        for name, content in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert pack(folder / "odd.tar", folder / "out") == 0 and len(packed(folder / "out")) == 1
    left = (folder / "out" / "left_out.jsonl").read_text()
    assert "the files of 'v1': 0.jpg, 0.txt; a name's key ends at its first dot" in left and len(left.splitlines()) == 2


def test_what_nothing_will_read_is_told_with_its_number(folder, capsys):
    turns = [{"role": "user", "content": "<image>?", "mood": 1}, {"role": "assistant", "content": "red"}]
    rows = [{"messages": turns, "images": ["0.jpg"], "tone": "kind"}, {"messages": turns, "images": ["0.jpg"]}]
    (folder / "r.json").write_text(json.dumps(rows))
    assert pack(folder / "r.json", folder / "out") == 0
    said = capsys.readouterr().out
    assert "keys of the JSON that nothing reads: tone (1 sample)" in said
    assert "keys of a turn that nothing reads: mood (2 samples)" in said


def test_a_folder_of_pictures_that_is_none_is_told_at_once(folder, capsys):
    """Else every record with a picture is left out, those without are packed, and the call is one of success."""
    (folder / "rows.jsonl").write_text(LINES + '{"question": "Which?", "answer": "red"}\n')
    assert pack(folder / "rows.jsonl", folder / "out", "--images", str(folder / "nowhere")) == 3
    assert capsys.readouterr().err.startswith(f"vlm-dist: data pack: --images: '{folder / 'nowhere'}' is no folder here")
    assert not (folder / "out").exists()
