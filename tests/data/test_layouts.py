"""`canonical`: any layout -> one form; whatever stands in a record, nothing but BadSample comes out of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dist.data import layout_boxes, layout_keys
from vlm_dist.data.layouts import LAYOUTS, Columns, canonical
from vlm_dist.errors import BadSample

Q, A = "Which colour?", "red"
PAIR = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]


def said(record, columns=None):
    return [(turn["role"], turn["content"]) for turn in canonical(record, columns)["messages"]]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": PAIR},
        PAIR,
        {"conversations": PAIR},
        {"conversation": PAIR},
        {"chat": PAIR},
        {"dialog": PAIR},
        {"qa": [{"question": Q, "answer": A}]},
        {"messages": [{"from": "Human", "value": Q}, {"from": "GPT", "value": A}]},
        {"conversations": [{"role": " USER: ", "content": Q}, {"role": "Model", "content": A}]},
        {"messages": [{"from": "human", "content": Q}, {"role": "chatbot", "value": A}]},
        {"messages": [{"speaker": "prompter", "text": Q}, {"speaker": "bot", "text": A}]},
        {"messages": [{"role": "user", "content": Q, "value": None, "from": None}, {"role": "ai", "content": A}]},
        {"messages": '[{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "red"}]'},
        {"conversations": [Q, A]},
        {"texts": [{"user": Q, "assistant": A}]},
        {"instruction": Q, "input": "", "output": A},
        {"query": Q, "response": A},
        {"prompt": Q, "completion": A},
        {"prompt": PAIR[:1], "completion": PAIR[1:]},
        {"question": Q, "answer": A},
        {"query": Q, "label": [A]},
        {"question": [Q], "answers": {"text": [A], "answer_start": [1]}},
        {"problem": Q, "solution": A},
        {"question": Q, "answers": [{"answer": "blue"}, {"answer": A}, {"answer": A}]},
        {"question": Q, "answers": "['red', 'dark red']"},
        {"question": Q, "answer": A, "answers": ["scarlet"]},
        {"input": Q, "output": A},
        {"user": Q, "assistant": A},
    ],
)
def test_a_question_and_its_answer(record):
    assert said(record) == [("user", Q), ("assistant", A)]


@pytest.mark.parametrize(
    ("record", "captions"),
    [
        ({"caption": "a"}, ["a"]),
        ({"caption": ["a", " ", "b"]}, ["a", "b"]),
        ({"captions": ["a", "b"]}, ["a", "b"]),
        ({"text": " a "}, ["a"]),
        ({"sentences": [{"raw": "a", "tokens": []}, {"raw": "b"}]}, ["a", "b"]),
        ({"caption_1": "b", "caption_0": "a"}, ["a", "b"]),
        ({"texts": ["a", "b"]}, ["a", "b"]),
        ({"image": 1, "label": "cat"}, ["cat"]),
        ({"comment": "a"}, ["a"]),
        ({"caption": "['a', 'b']"}, ["a", "b"]),
        ({"caption": "[1, 2]"}, ["[1, 2]"]),
    ],
)
def test_captions(record, captions):
    made = canonical(record)
    assert made["captions"] == captions and "messages" not in made


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image_url", "image_url": {"url": "a"}}, "a"),
        ({"type": "image_url", "image_url": "a"}, "a"),
        ({"type": "image", "image": "a"}, "a"),
        ({"type": "image", "path": "a"}, "a"),
        ({"type": "image", "url": "a"}, "a"),
        ({"type": "image", "base64": "QUJD"}, "data:;base64,QUJD"),
        ({"type": "input_image", "image_url": "a"}, "a"),
        ({"image": "a"}, "a"),
        ({"type": "image", "image": {"bytes": b"x", "path": None}}, {"bytes": b"x", "path": None}),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}, "data:;base64,QUJD"),
        ({"type": "image", "image": "a", "text": None, "image_url": None}, "a"),
        ({"inline_data": {"mime_type": "image/png", "data": "QUJD"}}, "data:;base64,QUJD"),
    ],
)
def test_pictures_in_parts(part, source):
    record = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": Q}]}, PAIR[1]]}
    made = canonical(record)
    assert made["images"] == [source] and made["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": Q}]


def test_pictures_in_order():
    def images(content, **more):
        return canonical({"messages": [{"role": "user", "content": content}, PAIR[1]], **more})["images"]

    own, other = {"type": "image", "image": "own"}, {"type": "image"}
    assert images([other, own, other], images=["a", "b"]) == ["a", "own", "b"]
    assert images([own, own], images=["a", "b"]) == ["a", "b"]  # a data set's column is where the pictures really are
    assert images([own], images=["a", "b"]) == ["own", "a", "b"]  # too many, which packing says
    assert images("<image><image>", image=["a", "b"]) == ["a", "b"] and images(Q, image="a") == ["a"] and images(Q, images="") == []
    assert images("<img>a.jpg</img>x") == ["a.jpg"] and images("<image 2>, <image 1>", image_1="a", image_2="b") == ["b", "a"]
    assert images("<image 1>, <image 2>") == [] and said({"question": "<image 2>, <image 1>", "answer": A})[0][1] == "<image 2>, <image 1>"
    assert said({"question": "<image 1>, <|image_2|>", "answer": A})[0][1] == "<image>, <image>"
    assert images(Q, images='["a", "b"]') == ["a", "b"] and images(Q, image="[1].jpg") == ["[1].jpg"]
    assert images(Q, file_name="no.jpg", url="https://page") == []
    assert canonical({"caption": "a", "file_name": "b.jpg"})["images"] == ["b.jpg"]
    assert canonical({"caption": "a", "images": [], "url": "https://x"})["images"] == []
    pixels = np.zeros((2, 2, 3))
    assert (
        canonical({"caption": "a", "image": pixels})["images"][0] is pixels
        and len(canonical({"caption": "a", "image": pixels.tolist()})["images"]) == 1
    )


def test_what_changes_the_meaning_is_kept():
    turns = [PAIR[0], {**PAIR[1], "loss": False, "weight": 0, "train": False, "name": "x"}]
    made = canonical({"system": "Be brief.", "conversations": turns, "tools": '[{"name": "f"}]', "objects": {"bbox": [[1]]}, "id": 3})
    assert made["messages"] == [{"role": "system", "content": "Be brief."}, *turns]
    assert (made["tools"], made["objects"], made["id"]) == ([{"name": "f"}], {"bbox": [[1]]}, 3)
    assert said({"system": "A", "messages": [{"role": "system", "content": "B"}, *PAIR]})[0] == ("system", "A\n\nB")
    assert len(said({"system": "B", "messages": [{"role": "developer", "content": "B"}, *PAIR]})) == 3
    assert said({"instruction": Q, "input": "x", "output": A, "system": "S", "history": [["a", "b"]]})[:3] == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
    ]


def test_tools_and_thoughts():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = [PAIR[0], call, {"role": "tool", "content": "3", "tool_call_id": "1"}, {**PAIR[1], "reasoning_content": "Hm."}]
    assert canonical({"messages": turns})["messages"] == turns
    sharegpt = [
        {"from": "human", "value": Q},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        {"from": "observation", "value": '{"n": 3}'},
        {"from": "gpt", "value": A},
    ]
    made = canonical({"conversations": sharegpt})["messages"]
    assert [turn["role"] for turn in made] == ["user", "assistant", "tool", "assistant"] and made[1]["content"] is None
    assert made[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_answers_and_options():
    vqa = canonical({"question": Q, "multiple_choice_answer": A, "answers": [{"answer": A}] * 9 + [{"answer": "pink"}]})
    assert vqa["answers"] == [A] * 9 + ["pink"] and vqa["messages"][1]["content"] == A
    assert canonical({"messages": PAIR, "answers": "one"})["answers"] == ["one"]
    assert said({"question": Q, "choices": ["3", "5", "1"], "answer": 1, "hint": "H"}) == [
        ("user", f"H\n{Q}\nA. 3\nB. 5\nC. 1"),
        ("assistant", "B"),
    ]
    assert said({"question": Q, "options": "['x', 'y']", "answer": "A"})[0] == ("user", f"{Q}\nA. x\nB. y")
    assert said({"question": Q, "A": "x", "B": "y", "C": "", "answer": "B"}) == [("user", f"{Q}\nA. x\nB. y"), ("assistant", "B")]
    assert said({"question": Q, "answer": 3})[1] == ("assistant", "3") and said({"question": Q, "answer": True})[1] == ("assistant", "yes")
    assert said({"question": [Q, "b"], "answer": [A, "c"]}) == [("user", Q), ("assistant", A), ("user", "b"), ("assistant", "c")]


def test_boxes():
    box = [4, 2, 20, 10]
    two = canonical({"image": "a", "bbox": box, "sentences": [{"raw": "R", "sent": "r"}, {"sent": "s"}]})
    assert two["objects"] == [{"bbox": [4, 2, 24, 12], "label": "R"}, {"bbox": [4, 2, 24, 12], "label": "s"}] and two["images"] == ["a"]
    assert canonical({"image": "a", "bbox_xyxy": box, "phrase": "p"})["objects"] == [{"bbox": box, "label": "p"}]
    assert canonical({"image": "a", "bbox": box, "raw_anns": "{}", "caption": "p"})["objects"][0]["bbox"] == box
    assert len(canonical({"image": "a", "bboxes": [box, box], "labels": ["p", "q"]})["objects"]) == 2
    for bad in ([1, 2, 3], [1, 2, 0, 3], [1, 2, "3", 4], [1, 2, float("nan"), 3]):
        with pytest.raises(BadSample, match="a box is"):
            canonical({"image": "a", "bbox": bad, "caption": "p"})


def test_named_columns():
    record = {"q": Q, "a": [A, "pink"], "pic": "x.jpg", "caption": "c"}
    made = canonical(record, Columns("q", "a", "pic"))
    assert made["images"] == ["x.jpg"] and made["answers"] == [A, "pink"] and made["messages"][0]["content"] == Q and made["caption"] == "c"
    assert canonical(record, Columns(answer="a"))["captions"] == [A, "pink"] and canonical(record, Columns(image="pic"))["images"] == [
        "x.jpg"
    ]
    with pytest.raises(BadSample, match="the record has no 'z'; its keys are q, a, pic, caption"):
        canonical(record, Columns("z"))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"a": 1, "b": 2}, "no text in a layout that is known; its keys are a, b; known are messages "),
        ({}, "its keys are none"),
        (3, "expected an object"),
        ([1], "expected an object"),
        ({"messages": []}, "expected a list of turns"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "'role' is 'judge'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "'role' is \\['user'\\]"),
        ({"messages": [{"role": "user", "content": None}]}, "neither text nor a list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "v"}]}]}, "a part of type 'audio'"),
        ({"messages": PAIR, "chosen": "a", "rejected": "b"}, "a pair of answers"),
        ({"prompt": Q, "completion": A, "label": False}, "not wanted"),
        ({"messages": PAIR, "kto_tag": False}, "not wanted"),
        ({"messages": PAIR, "audio": "v.wav"}, "only pictures, videos and text"),
        ({"prompt": Q, "chosen": A, "rejected": "b"}, "a pair of answers"),
        ({"caption": "a", "system": "s"}, "'system' stands beside a caption"),
        ({"messages": PAIR, "system": 3}, "'system' is 3"),
        ({"messages": PAIR, "tools": "x"}, "'tools' is 'x'"),
        ({"messages": PAIR, "answers": [[]]}, "'answers' is"),
        ({"question": [Q, Q], "answer": A}, "has 2 texts"),
    ],
)
def test_what_is_refused_says_why(record, words):
    with pytest.raises(BadSample, match=words) as caught:
        canonical(record)
    assert "\n" not in str(caught.value)


NAMES = sorted(
    {
        *layout_keys.TURN_KEYS,
        *layout_keys.QUESTIONS,
        *layout_keys.ANSWERS,
        *layout_keys.CAPTIONS,
        *layout_keys.EXPRESSIONS,
        *layout_boxes.BOX_KEYS,
        *layout_keys.SYSTEM,
        "image",
        "images",
        "image_1",
        "url",
        "role",
        "content",
        "from",
        "value",
        "type",
        "image_url",
        "history",
        "tools",
        "options",
        "A",
        "B",
        "hint",
        "objects",
        "chosen",
        "rejected",
        "kto_tag",
        "functions",
        "tool_calls",
        "parts",
        "raw_anns",
        *layout_keys.KNOWN,
        *layout_boxes.NAMES,
        *layout_boxes.FORM_KEYS,
        *layout_boxes.OWN_2D,
        "points",
        "point",
        "x",
        "y",
        "gt_parse",
        "Question",
        "imagePath",
        "Option A",
        "option_b",
        "<image_00>",
        "iscrowd",
        "size",
        "mask",
        "trainable",
    }
)
MARKUP = ["<image>", "<image 1>", "<image_00>", '["a"]', "['a']", "[[[", "\ud83d", " ", "{}", "A. x", '{"bbox": [[1, 2, 3, 4]]}']
WORDS = st.sampled_from(["user", "gpt", "function_call", "tool", "text", "xywh", "2", *MARKUP])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | WORDS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4), max_leaves=12
)
TURNS = st.lists(st.fixed_dictionaries({"role": WORDS | VALUES, "content": VALUES}), max_size=3)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), VALUES | TURNS, max_size=5) | VALUES)
def test_any_value_gives_a_record_or_a_reason(record):
    try:
        made = canonical(record)
    except BadSample as reason:
        assert "\n" not in str(reason) and str(reason).encode()
        return
    assert isinstance(made["images"], list)
    assert all(turn["role"] in ("user", "assistant", "system", "tool") for turn in made.get("messages", []))
    assert all(isinstance(text, str) for text in made.get("answers", []))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_each_layout_is_named_in_the_reason(layout):
    with pytest.raises(BadSample) as caught:
        canonical({"x": 1})
    assert f"{layout.name} ({layout.keys})" in str(caught.value)


def test_numbers_that_cannot_be_written():
    for number in (10**5000, float("nan"), float("inf")):
        with pytest.raises(BadSample):
            canonical({"question": Q, "answer": number})
        with pytest.raises(BadSample):
            canonical({"messages": [{"role": number, "content": Q}]})


@pytest.mark.parametrize("key", ["text", "json", "record", "data", "sample", "row", "example", "item"])
def test_a_record_in_a_record(key):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    inner = {"conversations": talk, "image": "a.jpg"}
    for made in (canonical({"id": 1, key: inner}), canonical({"id": 1, key: json.dumps(inner)})):
        assert made["images"] == ["a.jpg"] and made["messages"][1]["content"] == "A cat." and made["id"] == 1
