"""Records in the words of other trainers and data sets: read rightly, or refused in one line that says what decides; nothing is guessed."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from vlm_dist.data.dataset import parse_members
from vlm_dist.data.index_file import Place
from vlm_dist.data.layouts import Columns, canonical
from vlm_dist.data.samples import parse_sample
from vlm_dist.data.shards import write_shard
from vlm_dist.errors import BadSample

Q, A = "Which colour?", "red"
USER, ASSISTANT = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
BOX = [4, 2, 20, 10]


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(data, "JPEG")
    return data.getvalue()


def said(record, columns=None):
    return [(turn["role"], turn["content"]) for turn in canonical(record, columns)["messages"]]


def marked(record, boxes=None):
    made = canonical({"image": "0.jpg", **record}, Columns(boxes=boxes))
    return made["objects"], made.get("objects_size")


def parse(*, json_=None, **members):
    raw = {"__key__": "k", "__url__": "s.tar", "jpg": picture(), **members}
    raw |= {"json": json.dumps(json_).encode()} if json_ is not None else {}
    return parse_sample(raw, max_image_pixels=10_000, caption_prompt="Describe.")


@pytest.mark.parametrize(
    "record",
    [
        {"Question": Q, "Answer": A, "Image": "0.jpg"},
        {"QUESTION": Q, "ANSWER": A},
        {"prefix": Q, "suffix": A},
        {"prompt": [USER], "answer": A},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"input": [USER], "output": A},
        {"input": [USER], "output": [ASSISTANT]},
        {"question": [USER], "response": A},
        {"conversation": [{"system": "", "input": Q, "output": A}]},
        {"conversation": [{"instruction": Q, "output": A}]},
        {"conversations": {"from": ["human", "gpt"], "value": [Q, A]}},
        {"qa": [[Q, A]]},
        {"qa": {"question": Q, "answer": A}},
        {"questions": [{"question": Q, "answer": A}]},
        {"questions": {"question": [Q], "answer": [A]}},
        {"text": json.dumps({"question": Q, "answer": A})},
        {"ground_truth": json.dumps({"gt_parses": [{"question": Q, "answer": A}]})},
    ],
)
def test_a_question_and_its_answer(record):
    assert said(record) == [("user", Q), ("assistant", A)]


def test_turns_of_a_prompt_keep_their_roles_and_pairs_their_system():
    system = {"role": "system", "content": "S"}
    assert said({"prompt": [system, USER, ASSISTANT, USER], "answer": A})[0] == ("system", "S")
    pairs = [{"system": "S", "input": Q, "output": A}, {"input": "x", "output": "y"}]
    assert said({"conversation": pairs}) == [("system", "S"), ("user", Q), ("assistant", A), ("user", "x"), ("assistant", "y")]
    assert said({"system_instruction": "S", "messages": [USER, ASSISTANT]})[0] == ("system", "S")
    assert said({"conversation": [{"instruction": Q, "input": "One word.", "output": A}]})[0] == ("user", f"{Q}\nOne word.")


@pytest.mark.parametrize(
    ("record", "caption"),
    [
        ({"Caption": "a"}, "a"),
        ({"prefix": "", "suffix": "a"}, "a"),
        ({"ground_truth": json.dumps({"gt_parse": {"text_sequence": "a"}})}, "a"),
        ({"ground_truth": {"gt_parse": {"menu": [{"nm": "é"}]}}}, '{"menu": [{"nm": "é"}]}'),
        ({"text": '{"menu": 1}'}, '{"menu": 1}'),
    ],
)
def test_captions(record, caption):
    assert canonical({"image": "0.jpg", **record})["captions"] == [caption]


@pytest.mark.parametrize(
    ("record", "words", "columns"),
    [
        ({"question": Q, "Question": "other", "answer": A}, "'question' and 'Question' are one name; `data pack --question", "question"),
        ({"question": Q, "query": "other", "answer": A}, "'question' and 'query' could both be the question; `data pack --q", "question"),
        ({"question": Q, "answer": A, "response": "x"}, "'answer' and 'response' could both be the answer; `data pack --a", ""),
        ({"text": "a", "description": "b"}, "'text' and 'description' could both be the caption; `data pack --answer", ""),
        (
            {"question": Q, "answer": A, "bbox": BOX},
            "beside a box: `data pack --question KEY` reads the question, --b",
            "question",
        ),
        ({"question": Q, "options": ["3", "2", "5"], "answer": "2"}, "may be the option '2' \\(B\\), or the number .* \\(C\\)", None),
    ],
)
def test_of_two_readings_the_user_chooses(record, words, columns):
    with pytest.raises(BadSample, match=words) as caught:
        canonical(record)
    assert "\n" not in str(caught.value)
    if columns is not None:
        assert canonical(record, Columns(columns or None, "answer" if "answer" in record else "text"))
    assert canonical({**record, **dict.fromkeys(("Question", "query", "response", "description", "bbox"), None), "options": None})


def test_what_cannot_decide_the_reading_stays():
    assert canonical({"id": 1, "ID": 2, "Question": Q, "answer": A})["ID"] == 2


def test_what_says_the_same_twice_has_one_reading():
    assert said({"question": Q, "Question": Q, "query": Q, "answer": A, "response": A}) == [("user", Q), ("assistant", A)]


def test_objects_in_columns():
    coco = {
        "id": [1, 2, 3],
        "area": [200, 4, 9],
        "bbox": [BOX, [1, 1, 2, 2], [0, 0, 9, 9]],
        "category": ["cat", 4, "x"],
        "iscrowd": [0, 0, 1],
    }
    objects, size = marked({"objects": coco, "width": 64, "height": 48})
    assert objects == [{"bbox": [4, 2, 24, 12], "label": "cat"}, {"bbox": [1, 1, 3, 3], "label": "4"}] and size == [64, 48]
    assert canonical(canonical({"image": "0.jpg", "objects": coco}))["objects"] == objects
    assert canonical({"image": "0.jpg", "objects": coco})["crowds"] == 1
    assert marked({"objects": {"bbox": [BOX], "categories": ["cat"]}}, "xyxy")[0] == [{"bbox": BOX, "label": "cat"}]
    assert marked({"objects": {"bbox": [[0.5, 0.5, 0.2, 0.1]], "label": ["cat"]}}, "cxcywh/1") == (
        [{"bbox": [0.4, 0.45, 0.6, 0.55], "label": "cat"}],
        [1, 1],
    )
    assert marked({"objects": json.dumps({"bbox": [BOX], "category": ["cat"]})})[0][0]["bbox"] == [4, 2, 24, 12]
    swift = {"ref": ["cat"], "bbox": [BOX]}
    assert marked({"objects": swift})[0] == swift
    for bad, words in (
        ({"bbox": [BOX], "category": []}, "1 of 'bbox' and 0 of 'category'"),
        ({"bbox": [], "category": []}, "marks nothing"),
    ):
        with pytest.raises(BadSample, match=words):
            marked({"objects": bad})
    with pytest.raises(BadSample, match="'bbox_format' is 'odd'; expected one of xywh, xyxy"):
        marked({"objects": {"bbox": [BOX], "category": ["cat"]}, "bbox_format": "odd"})


def test_objects_one_by_one():
    assert marked({"objects": [{"bbox": BOX, "label": 3}]})[0] == [{"bbox": BOX, "label": "3"}]
    annotation = {"bbox": BOX, "category": "cat", "area": 200, "id": 1}
    with pytest.raises(BadSample, match=r"'objects' has 'area', as COCO's annotations.*--boxes` says which"):
        marked({"objects": [annotation]})
    assert marked({"objects": [annotation]}, "xywh")[0] == [{"bbox": [4, 2, 24, 12], "label": "cat"}]
    qwen = {"objects": [{"bbox_2d": [40, 20, 200, 100], "label": "cat"}, {"point_2d": [5, 6], "label": "dog"}]}
    with pytest.raises(BadSample, match="'bbox_2d' may be pixels of the picture \\(xyxy\\) or thousandths of it \\(xyxy/1000\\)"):
        marked(qwen)
    expected = [{"bbox": [40, 20, 200, 100], "label": "cat"}, {"point": [5, 6], "label": "dog"}]
    assert marked(qwen, "xyxy") == (expected, None) and marked(qwen, "xyxy/1000") == (expected, [1000, 1000])
    assert marked({**qwen, "objects_size": [1000, 1000]})[0] == expected
    assert marked({"objects": [{"bbox_2d": [40, 20, 1200, 100]}]}) == ([{"bbox": [40, 20, 1200, 100]}], None)
    assert marked({"objects": [{"box_2d": [20, 40, 100, 200], "label": "cat"}]}) == (expected[:1], [1000, 1000])  # Gemma's: y first


def test_points():
    points = {"points": [{"x": 10.5, "y": 50.0}], "label": "box", "count": 1}
    with pytest.raises(BadSample, match="'points' may be pixels of the picture \\(xy\\) or hundredths of it \\(xy/100\\)"):
        marked(points)
    expected = [{"point": [10.5, 50.0], "label": "box"}]
    assert marked(points, "xy/100") == (expected, [100, 100]) and marked(points, "xy") == (expected, None)
    assert marked({**points, "points": {"x": [300.0], "y": [50.0]}})[0] == [{"point": [300.0, 50.0], "label": "box"}]
    with pytest.raises(BadSample, match="no point of 'box'"):
        marked({**points, "points": []})


def test_placeholders_that_name_their_pictures():
    record = {
        "image": {"<image_00>": "a", "<image_01>": "b"},
        "conversations": [{"role": "user", "content": "<image_01> and <image_00>"}, {**ASSISTANT, "content": "<image_00>"}],
    }
    made = canonical(record)
    assert made["images"] == ["b", "a", "a"] and [turn["content"] for turn in made["messages"]] == ["<image> and <image>", "<image>"]
    assert canonical({**record, "conversations": [USER, ASSISTANT]})["images"] == ["a", "b"]
    assert canonical({**record, "image": {"<image_00>": "a", "<image_01>": None}, "conversations": [USER, ASSISTANT]})["images"] == ["a"]
    with pytest.raises(BadSample, match="a picture is an object with front, back; expected bytes"):
        canonical({**record, "image": {"front": "a", "back": "b"}})


@pytest.mark.parametrize("marker", ["<|image|>", "<Image>", "<ImageHere>", "<|vision_start|><|image_pad|><|vision_end|>", "[IMG]"])
def test_markers_of_other_trainers_stand_for_as_many_pictures(marker):
    assert said({"images": ["a", "b"], "question": f"{marker} or {marker}?", "answer": A})[0] == ("user", "<image> or <image>?")
    assert said({"images": ["a"], "question": f"{marker} or {marker}?", "answer": A})[0] == ("user", f"{marker} or {marker}?")


@pytest.mark.parametrize(
    "options",
    [
        {"options": {"A": "cat", "B": "dog"}},
        {"options": [{"label": "A", "text": "cat"}, {"label": "B", "text": "dog"}]},
        {"options": [{"A": "cat"}, {"B": "dog"}]},
        {"choices": {"label": ["A", "B"], "text": ["cat", "dog"]}},
        {"options": ["A. cat", "B. dog"]},
        {"options": ["(A) cat", "(B) dog"]},
        {"options": '["A: cat", "B: dog"]'},
        {"choice_a": "cat", "choice_b": "dog"},
        {"optionA": "cat", "optionB": "dog"},
        {"Option A": "cat", "Option B": "dog"},
    ],
)
@pytest.mark.parametrize("answer", ["B", 1])
def test_options_are_lettered_once(options, answer):
    made = canonical({"question": Q, **options, "answer": answer})
    assert [turn["content"] for turn in made["messages"]] == [f"{Q}\nA. cat\nB. dog", "B"]
    assert set(made) == {"messages", "images", "videos", "answers"}


def test_options_with_labels_of_their_own_and_in_the_question():
    assert said({"question": Q, "choices": {"label": ["1", "2"], "text": ["cat", "dog"]}, "answer": "2"}) == [
        ("user", f"{Q}\n1. cat\n2. dog"),
        ("assistant", "2"),
    ]
    listed = f"{Q}\n(A) cat\n(B) dog"
    assert said({"question": listed, "options": ["cat", "dog"], "answer": 1}) == [("user", listed), ("assistant", "B")]
    assert said({"question": Q, "options": ["A. Milne", "B. Shaw", "C. Wells"], "answer": "C. Wells"})[1] == ("assistant", "C")
    assert said({"question": Q, "options": ["A. cat", "a dog"], "answer": 0})[0] == ("user", f"{Q}\nA. A. cat\nB. a dog")


@pytest.mark.parametrize("key", ["trainable", "is_trainable", "training", "train_on", "loss_weight", "loss_scale", "loss_mask"])
def test_flags_of_turns_are_obeyed_and_told(key):
    sample = parse(json_={"messages": [USER, {**ASSISTANT, key: 0}, USER, {**ASSISTANT, key: 1}]})
    assert [turn.get("weight", 1.0) for turn in sample.messages] == [1.0, 0.0, 1.0, 1.0]
    assert sample.notes == {("weight", key)}


@pytest.mark.parametrize("flag", [{"mask": True}, {"masked": 0}, {"train_detail": [{"begin_offset": 0}]}])
def test_flags_that_mean_either_are_refused(flag):
    with pytest.raises(BadSample, match=f"'{next(iter(flag))}' is .* may mean learnt or left out; write 'train': true or false"):
        parse(json_={"messages": [USER, {**ASSISTANT, **flag}]})


def test_keys_of_parts_that_nothing_reads_are_told():
    part = {"type": "text", "text": Q, "foo": 1, "bar": None}
    sample = parse(
        json_={"messages": [{"role": "user", "content": [{"type": "image", "image": "x.jpg", "min_pixels": 9}, part]}, ASSISTANT]}
    )
    assert sample.notes == {("part key", "foo"), ("part key", "min_pixels")}


def test_a_marker_without_a_picture_says_what_stands_for_one():
    raw = {"__key__": "k", "json": json.dumps({"messages": [{**USER, "content": "<image>?"}, ASSISTANT]}).encode()}
    with pytest.raises(BadSample, match=r"speaks of 1 pictures, the sample has 0 .*; <image> in a text, and a part of type image, each"):
        parse_sample(raw, max_image_pixels=10_000, caption_prompt="Describe.")


def test_a_text_beside_a_json_is_learnt_or_told():
    assert parse(txt=b"a cat", json_={"caption": "a cat", "url": "u"}).notes == set()
    assert parse(txt=b"a cat", json_={"caption": "a dog", "url": "u"}).notes == {("text", "caption")}
    for record in ({"messages": [USER, ASSISTANT]}, {"question": Q, "answer": A}, {"captions": ["a dog"]}):
        sample = parse(txt=b"a cat", json_=record)
        assert sample.notes == {("text", ".txt")} and "a cat" not in str(sample.messages)
    assert parse(txt=A.encode(), json_={"messages": [USER, ASSISTANT]}).notes == set()
    assert parse(json_={"messages": [USER, ASSISTANT], "caption": "a cat"}).notes == {("text", "caption")}
    assert parse(json_={"messages": [USER, ASSISTANT], "answer": A}).notes == set()


@pytest.mark.parametrize(("second", "shown"), [("k.jpg", "'k.jpg' twice"), ("k.JPG", "'k.jpg' and 'k.JPG', which are one, twice")])
def test_a_member_that_stands_twice_is_one_clear_line(tmp_path, second, shown):
    import tarfile

    path = tmp_path / "s.tar"
    write_shard(path, iter([]))
    with tarfile.open(path, "w") as tar:
        for name in ("k.jpg", "k.json", second):
            info = tarfile.TarInfo(name)
            tar.addfile(info, io.BytesIO())
    size = path.stat().st_size
    with pytest.raises(BadSample) as caught:
        parse_members(path.read_bytes()[: 3 * 512], Place(str(path), 0, size))
    assert str(caught.value) == f"sample 'k' of shard '{path}' has {shown}; write the shard anew with one of them"


def test_pictures_that_turns_hold_themselves():
    made = canonical({"messages": [{**USER, "images": ["a", {"path": "b"}]}, ASSISTANT]})  # Ollama's
    assert made["images"] == ["a", "b"] and [part["type"] for part in made["messages"][0]["content"]] == ["image", "image", "text"]
    made = canonical({"messages": [{"role": "user", "content": "<image>?", "image": "a"}, ASSISTANT]})
    assert made["images"] == ["a"] and made["messages"][0] == {"role": "user", "content": "<image>?"}
    typed = [{"type": "image"}, {"type": "text", "text": Q}]
    assert canonical({"messages": [{"role": "user", "content": typed, "images": ["a"]}, ASSISTANT]})["images"] == ["a"]
    with pytest.raises(BadSample, match="a turn has 2 pictures, and places for 1"):
        canonical({"messages": [{"role": "user", "content": "<image>?", "images": ["a", "b"]}, ASSISTANT]})


def test_two_keys_of_other_pictures():
    assert canonical({"images": ["a"], "image": "a", "caption": "c"})["images"] == ["a"]
    with pytest.raises(BadSample, match="'images' and 'image' name other pictures; `data pack --image NAME` says which"):
        canonical({"images": ["a"], "image": "b", "caption": "c"})
    assert canonical({"images": ["a"], "image": "b", "caption": "c"}, Columns(image="images,image"))["images"] == ["a", "b"]


def test_thoughts_in_parts():
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": A}]
    assert canonical({"messages": [USER, {"role": "assistant", "content": parts}]})["messages"][1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": A}],
        "reasoning_content": "Hm.",
    }


@pytest.mark.parametrize(
    "box",
    [
        {"x": 4, "y": 2, "w": 20, "h": 10},
        {"left": 4, "top": 2, "width": 20, "height": 10},
        {"xmin": 4, "ymin": 2, "xmax": 24, "ymax": 12},
        {"x1": 4, "y1": 2, "x2": 24, "y2": 12},
    ],
)
def test_boxes_by_the_names_of_their_sides(box):
    assert marked({"objects": [{**box, "names": ["cat"]}]})[0] == [{"bbox": [4, 2, 24, 12], "label": "cat"}]
    assert marked({"objects": [{"bbox": box, "label": "cat"}]})[0][0]["bbox"] == [4, 2, 24, 12]
    sample = parse(json_={"objects": [{**box, "names": ["cat"]}]})
    assert sample.objects[0].box == (4, 2, 24, 12) and sample.objects[0].label == "cat" and not sample.notes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 0.5 0.5 0.2 0.2\n3 0.1 0.1 0.05 0.05", "is YOLO's boxes, no caption"),
        ("<|im_start|>user\n?<|im_end|>", "a chat template wrote"),
        ("USER: <image>\nWhich? ASSISTANT: red", "a chat template wrote"),
        ("### Instruction:\nWhich?\n### Response:\nred", "a chat template wrote"),
    ],
)
def test_what_is_no_caption(text, words):
    with pytest.raises(BadSample, match=words):
        canonical({"image": "0.jpg", "text": text})
    with pytest.raises(BadSample, match=words):
        parse(txt=text.encode())


def test_documents_of_texts_and_pictures_are_refused():
    with pytest.raises(BadSample, match="a document of texts and pictures by turns"):
        canonical({"images": [None, "u"], "texts": ["a", None]})


def test_several_right_options_are_not_one():
    with pytest.raises(BadSample, match=r"'answer' names several options \(A, B\)"):
        canonical({"question": Q, "options": ["cat", "dog"], "answer": ["A", "B"]})
    assert said({"question": Q, "options": ["cat", "dog"], "answer": ["A", "A"]})[1] == ("assistant", "A")


def test_placeholders_in_another_order_than_the_files_of_a_shard():
    record = {"images": ["a", "b"], "messages": [{"role": "user", "content": "<image 2>, <image 1>"}, ASSISTANT]}
    raw = {"__key__": "k", "0.jpg": picture(), "1.jpg": picture(), "json": json.dumps(record).encode()}
    with pytest.raises(BadSample, match="in another order than their files have; `data pack` writes them in order"):
        parse_sample(raw, max_image_pixels=10_000, caption_prompt="Describe.")
