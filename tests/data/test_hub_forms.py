"""Data sets in the form that their cards state, made up small: through `data pack`, `data verify` with a model, and two steps of training.

Cards: detection-datasets and cppe-5 (objects in columns, COCO's boxes), lmms-lab/LLaVA-OneVision-Data, HuggingFaceM4/the_cauldron and
Docmatix, Lin-Chen/ShareGPT4V, allenai/pixmo-points, lmms-lab/RefCOCO, lmms-lab/VQAv2 and textvqa, HuggingFaceM4/ChartQA,
naver-clova-ix/cord-v2, MiniCPM-V's and PaliGemma's fine-tuning JSON, img2dataset's tars."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import losses_of, write_config
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.data.shards import read_in_order

Q, A = "Which colour?", "red"
SHAREGPT = [{"from": "human", "value": f"<image>\n{Q}"}, {"from": "gpt", "value": A}]
ASKED = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]


def picture(number: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 48), (200, number, 0)).save(data, "PNG")
    return data.getvalue()


def cell(number: int = 0) -> dict[str, Any]:
    return {"bytes": picture(number), "path": None}


def hub_rows() -> dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]]:
    """name -> (a row, flags, what KEY.json holds)."""
    objects = {"id": [1, 2], "area": [200, 4], "bbox": [[4.0, 2.0, 20.0, 10.0], [1.0, 1.0, 2.0, 2.0]], "category": [1, 0]}
    boxes = [{"bbox": [4.0, 2.0, 24.0, 12.0], "label": "cat"}, {"bbox": [1.0, 1.0, 3.0, 3.0], "label": "dog"}]
    refcoco = {"question": "What is in the box?", "answer": ["left", "the left"], "bbox": [4.0, 2.0, 20.0, 10.0], "iscrowd": 0}
    vqa = [{"answer": A, "answer_confidence": "yes", "answer_id": 1}, {"answer": "pink", "answer_confidence": "no", "answer_id": 2}]
    menu = {"menu": [{"nm": "tea", "price": "1"}]}
    return {
        "detection": ({"image": cell(), "image_id": 7, "width": 64, "height": 48, "objects": objects}, (), {"objects": boxes}),
        "onevision": ({"id": "1", "image": cell(), "conversations": SHAREGPT, "data_source": "x"}, (), {}),
        "cauldron": ({"images": [cell()], "texts": [{"user": Q, "assistant": A, "source": "x"}]}, (), {}),
        "docmatix": ({"images": [cell(), cell(1)], "texts": [{"user": Q, "assistant": A, "source": "PDF"}]}, (), {}),
        "points": (
            {"image": cell(), "points": [{"x": 50.0, "y": 25.0}], "count": 1, "label": "box", "collection_method": "pointing"},
            ("--boxes", "xy/100"),
            {"objects": [{"point": [50.0, 25.0], "label": "box"}], "objects_size": [100, 100]},
        ),
        "refcoco": (
            {"question_id": "1", "image": cell(), **refcoco, "file_name": "COCO.jpg"},
            ("--boxes", "xywh"),
            {"objects": [{"bbox": [4.0, 2.0, 24.0, 12.0], "label": label} for label in ("left", "the left")]},
        ),
        "vqav2": (
            {"question_type": "what", "multiple_choice_answer": A, "answers": vqa, "image_id": 7, "question": Q, "image": cell()},
            (),
            {"answers": [A, "pink"]},
        ),
        "textvqa": ({"image_id": "x", "question": Q, "image": cell(), "flickr_300k_url": "u", "answers": [A, A]}, (), {"answers": [A, A]}),
        "chartqa": ({"image": cell(), "query": Q, "label": [A], "human_or_machine": 0}, (), {"answers": [A], "human_or_machine": "human"}),
        "donut": ({"image": cell(), "ground_truth": json.dumps({"gt_parse": menu, "meta": {}})}, (), {"caption": json.dumps(menu)}),
    }  # fmt: skip


def write_parquet(row: dict[str, Any], path: Path) -> str:
    """As the hub stores it: pictures and classes noted as such."""
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    features = Features(dict(Dataset.from_list([row]).features))
    kinds = {"image": Image(), "images": List(Image()), "human_or_machine": ClassLabel(names=["human", "machine"])}
    features.update({name: kinds[name] for name in row if name in kinds})
    if "objects" in features:
        boxes = {"id": List(Value("int64")), "area": List(Value("int64")), "bbox": List(List(Value("float32")))}
        features["objects"] = {**boxes, "category": List(ClassLabel(names=["dog", "cat"]))}
    Dataset.from_list([row], features=features).to_parquet(path)
    return str(path)


def pack(source: str, out: Path, *more: str) -> dict[str, Any]:
    assert main(["data", "pack", source, str(out), "--processes", "1", *more]) == 0
    (raw,) = read_in_order([str(path) for path in out.glob("*.tar")])
    return json.loads(raw["json"])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The shards of all forms, and what KEY.json holds in each."""
    folder = tmp_path_factory.mktemp("forms")
    (folder / "0.png").write_bytes(picture())
    (folder / "1.png").write_bytes(picture(1))
    found = {
        name: pack(write_parquet(row, folder / f"{name}.parquet"), folder / name, *flags) for name, (row, flags, _) in hub_rows().items()
    }
    compared = [{"role": "user", "content": "<image_01> or <image_00>?"}, {"role": "assistant", "content": "the first"}]
    lines = {
        "sharegpt4v": {"id": "sa_1", "image": "0.png", "conversations": SHAREGPT},
        "minicpm": {"id": "0", "image": {"<image_00>": "0.png", "<image_01>": "1.png"}, "conversations": compared},
        "paligemma": {"image": "0.png", "prefix": Q, "suffix": A},
    }
    for name, record in lines.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
        found[name] = pack(str(folder / f"{name}.jsonl"), folder / name)
    members = {
        "000.png": picture(),
        "000.txt": b"a red box",
        "000.json": json.dumps({"caption": "a red box", "url": "http://x", "key": "000"}).encode(),
    }
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found["img2dataset"] = pack(str(folder / "00000.tar"), folder / "img2dataset")
    return [str(folder / name / "train-000000.tar") for name in found], found


@pytest.mark.parametrize("name", ["onevision", "cauldron", "docmatix", "vqav2", "textvqa", "chartqa", "sharegpt4v", "paligemma"])
def test_a_question_and_its_answer(made, name):
    turns = [turn["content"].replace("<image>\n", "") for turn in made[1][name]["messages"]]
    assert turns == [Q, A]


@pytest.mark.parametrize("name", list(hub_rows()))
def test_what_else_the_row_says(made, name):
    expected = hub_rows()[name][2]
    assert {key: made[1][name].get(key) for key in expected} == expected


def test_pictures_in_the_order_of_their_placeholders_and_captions_of_tars(made):
    assert made[1]["minicpm"]["messages"][0]["content"] == "<image> or <image>?" and made[1]["img2dataset"]["caption"] == "a red box"
    (raw,) = read_in_order([next(shard for shard in made[0] if "minicpm" in shard)])
    assert (raw["0.png"], raw["1.png"]) == (picture(1), picture())


def test_all_of_them_are_sound_and_learnt_from(made, settings, tmp_path, capsys):
    settings["data"] = {"train": made[0], "max_seq_length": 512, "workers": 0}
    settings["training"] = {"steps": 2, "global_batch": len(made[0]) // 2, "micro_batch": 1}
    path = write_config(settings, tmp_path)
    assert main(["data", "verify", str(path)]) == 0
    out = capsys.readouterr().out
    assert "nothing reads" in out and "source" in out
    train(load_config(path))
    run = tmp_path / "runs" / "tiny"
    assert len(losses_of(run)) == 2 and not (run / "quarantine.jsonl").exists()


CORNERS = {"bbox": [[40.0, 20.0, 60.0, 40.0]], "category": ["cat"]}
SIDES = {"left_image": "0.png", "right_image": "0.png"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"objects": CORNERS, "width": 64, "height": 48}, "fits as x1, y1, x2, y2, not as COCO"),
        ({"objects": [{"bbox_2d": [4, 2, 20, 10], "label": "cat"}]}, "may be pixels of the picture (xyxy) or thousandths"),
        ({"objects": [{"bbox": [4, 2, 200, 10], "label": "cat"}]}, "outside of its picture, which has 64 x 48 pixels; `data pack --boxes`"),
        ({**SIDES, "question": Q, "answer": A}, "`data pack --image left_image,right_image` reads it"),
    ],
)
def test_what_training_would_refuse_packing_refuses_in_one_line(tmp_path, capsys, row, words):
    (tmp_path / "0.png").write_bytes(picture())
    (tmp_path / "r.json").write_text(json.dumps([{**({} if "left_image" in row else {"image": "0.png"}), **row}]))
    assert main(["data", "pack", str(tmp_path / "r.json"), str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
    if "left_image" in row:
        assert pack(str(tmp_path / "r.json"), tmp_path / "out", "--image", "left_image,right_image")["messages"][0]["content"] == Q


def test_how_boxes_are_read_is_told_before_packing(tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(picture())
    (tmp_path / "r.json").write_text(json.dumps([{"image": "0.png", "objects": {"bbox": [[4, 2, 20, 10]], "category": [3]}}]))
    pack(str(tmp_path / "r.json"), tmp_path / "out")
    out = capsys.readouterr().out
    assert "boxes: read as x, y, width, height, in pixels (1); --boxes says otherwise; packed as x1, y1, x2, y2" in out
    assert "objects and captions that are the number of a class alone, which is what is learnt: label 3 (1 sample)" in out
    assert main(["data", "pack", str(tmp_path / "r.json"), str(tmp_path / "out2"), "--boxes", "odd"]) == 3
    assert "--boxes: found 'odd'; expected one of xywh, xyxy" in capsys.readouterr().err


def test_one_odd_box_does_not_decide_how_all_are_read(tmp_path):
    (tmp_path / "0.png").write_bytes(picture())
    boxes = [[40, 20, 60, 40], [40, 20, 10, 10], [30, 20, 10, 10]]
    rows = [{"image": "0.png", "width": 64, "height": 48, "objects": {"bbox": [box], "category": ["cat"]}} for box in boxes]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    assert main(["data", "pack", str(tmp_path / "r.json"), str(tmp_path / "out"), "--processes", "1"]) == 0
    (left_out,) = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert left_out["record"] == 0 and "[40, 20, 100, 60]" in left_out["reason"]


def test_a_text_beside_the_json_of_a_tar_is_told(tmp_path, capsys):
    members = {"k.png": picture(), "k.txt": b"a cat", "k.json": json.dumps({"messages": ASKED}).encode()}
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert main(["data", "verify", str(tmp_path / "s.tar")]) == 0
    assert "texts beside the one that is learnt, which nothing reads: .txt (1 sample)" in capsys.readouterr().out
    assert pack(str(tmp_path / "s.tar"), tmp_path / "out")[".txt"] == "a cat"
    assert "keys of the JSON that nothing reads: .txt (1 sample)" in capsys.readouterr().out


def test_pictures_that_a_name_stands_for(tmp_path, capsys):
    """TextVQA's and GQA's own JSON."""
    (tmp_path / "n12.jpg").write_bytes(picture())
    (tmp_path / "r.json").write_text(json.dumps([{"imageId": "n12", "question": Q, "answer": A}]))
    assert pack(str(tmp_path / "r.json"), tmp_path / "out")["messages"] == ASKED
    (tmp_path / "r.json").write_text(json.dumps([{"image_id": "n13", "question": Q, "answers": [A]}]))
    assert main(["data", "pack", str(tmp_path / "r.json"), str(tmp_path / "out2")]) == 3
    assert "as n13.jpg or n13.png; say where the pictures lie: --images FOLDER" in capsys.readouterr().err
