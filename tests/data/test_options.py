"""Multiple choice and lists of questions: an answer is that of its own place, or the record is refused."""

from __future__ import annotations

import re

import pytest

from vlm_dist.data.layouts import canonical
from vlm_dist.data.messages import unread_keys
from vlm_dist.data.pack_files import read_table
from vlm_dist.errors import BadSample, DataError

Q, A = "Which colour?", "red"
OPTIONS = ["cat", "dog", "hen"]


def said(record):
    return [(turn["role"], turn["content"]) for turn in canonical({"image": "0.jpg", "question": Q, **record})["messages"]]


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"choices": ["cat", "", "hen"], "answer": 2}, "A. cat\nC. hen"),
        ({"choices": ["cat", None, "hen"], "answer": "C"}, "A. cat\nC. hen"),
        ({"options": {"A": "cat", "B": "", "C": "hen"}, "answer": "C"}, "A. cat\nC. hen"),
        ({"A": "cat", "B": "", "C": "hen", "answer": "C"}, "A. cat\nC. hen"),
        ({"option_a": "cat", "option_c": "hen", "answer": 2}, "A. cat\nC. hen"),
        ({"choices": ["A. cat", "", "C. hen"], "answer": 2}, "A. cat\nC. hen"),
        ({"choices": OPTIONS, "answer": 2.0}, "A. cat\nB. dog\nC. hen"),
        ({"choices": OPTIONS, "answer": "2.0"}, "A. cat\nB. dog\nC. hen"),
        ({"options": "A. cat\nB. dog\nC. hen", "answer": "C"}, "A. cat\nB. dog\nC. hen"),
        ({"options": ["A、cat", "B、dog", "C、hen"], "answer": "C、hen"}, "A. cat\nB. dog\nC. hen"),
    ],
)
def test_an_empty_option_keeps_its_place_and_its_letter(options, lines):
    assert said(options) == [("user", f"{Q}\n{lines}"), ("assistant", "C")]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"choices": OPTIONS, "answer": 3}, "the answer 3 is none of the options A, B, C"),
        ({"choices": OPTIONS, "answer": "3"}, "none of the options"),
        ({"choices": OPTIONS, "answer": -1}, "none of the options"),
        ({"choices": OPTIONS, "answer": "E"}, "the answer E is none"),
        ({"choices": ["cat", "", "hen"], "answer": 1}, "none of the options A, C"),
        ({"choices": [1, 2, 3], "answer": 1}, "may be the option '1'"),
        ({"choices": ["x"] * 27, "answer": 26}, "27 options"),
        ({"options": "cat; dog", "answer": "B"}, "'options' is 'cat; dog'"),
    ],
)
def test_an_answer_that_names_no_option_is_refused(record, words):
    with pytest.raises(BadSample, match=words):
        said(record)


def test_an_answer_that_is_the_text_of_an_option_stays():
    assert said({"choices": [10, 20, 30], "answer": 20})[1] == ("assistant", "20")
    assert said({"choices": ["yes", "no"], "answer": True})[1] == ("assistant", "yes")
    assert said({"choices": OPTIONS, "answer": "a small cat"})[1] == ("assistant", "a small cat")


def test_each_question_has_the_answer_in_its_own_place():
    made = canonical({"image": "0.jpg", "question": ["q1", "", "q3"], "answers": [["a1"], [], ["a3", "b", "a3"]]})
    assert [turn["content"] for turn in made["messages"]] == ["q1", "a1", "q3", "a3"]
    for asked, answers in ((["q1", "", "q3"], ["a1", "a2", ""]), (["q1", "q2"], [["a1", "a2"], []]), ([["q1", "q2"]], [["a1", "a2"]])):
        with pytest.raises(BadSample, match="one answer in the place of each question"):
            canonical({"image": "0.jpg", "question": asked, "answers": answers})


def test_a_class_beside_an_answer_is_not_the_answer():
    assert said({"response": A, "label": 0})[1] == ("assistant", A)
    with pytest.raises(BadSample, match="not wanted"):
        said({"response": A, "label": False})


def test_a_picture_of_a_pair_belongs_to_its_question():
    made = canonical({"qa": [{"question": Q, "answer": A, "image": "1.jpg"}]})
    assert made["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": Q}]
    assert (made["messages"][1]["content"], made["images"]) == (A, ["1.jpg"])


def test_pictures_of_turns_and_of_the_record_that_are_others_are_refused():
    turns = [{"role": "user", "content": [{"type": "image", "image": "1.jpg"}]}, {"role": "assistant", "content": A}]
    for other in ("data/1.jpg", "data\\\\1.jpg", "%31.jpg", "https://a.b/c.jpg"):
        assert canonical({"messages": turns, "images": [other]})["images"] == [other]
    with pytest.raises(BadSample, match=r"'1\.jpg', the record '0\.jpg'"):
        canonical({"messages": turns, "images": ["0.jpg"]})


def test_what_says_that_a_question_is_learnt_is_told():
    turns = [{"role": "user", "content": Q, "train": True, "weight": 0}, {"role": "assistant", "content": A, "train": True}]
    assert unread_keys(turns) == {"train (of a turn that is no assistant's)"}


def test_a_turn_that_contradicts_itself_is_told():
    assert unread_keys([{"role": "user", "from": "human", "content": Q, "value": Q}]) == set()
    assert unread_keys([{"role": "user", "from": "gpt", "content": Q, "value": A}]) == {"from", "value"}


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("image,question,answer,answer\n0.jpg,q,red,blue\n")
    with pytest.raises(DataError, match="two columns 'answer'"):
        list(read_table(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.tsv", '1.jpg\t"open\tz\n2.jpg\tlast"\tw\n', "several rows within quotes"),
        ("t.tsv", '1.jpg\t"a" b\tz\n', "line 2: .*written twice"),
        ("t.csv", '1.jpg,"open,z\n2.jpg,"last",w\n', "lines 2 to 3: .*written twice"),
    ],
)
def test_rows_that_a_stray_quote_joins_are_refused(tmp_path, name, text, words):
    comma = "\t" if name == "t.tsv" else ","
    path = tmp_path / name
    path.write_text(f"{comma.join(('image', 'question', 'answer'))}\n{text}{comma.join(('3.jpg', 'q', 'a'))}\n")
    refused, *rows = read_table(path)
    assert isinstance(refused, BadSample)
    assert re.search(words, str(refused))
    assert rows == [{"image": "3.jpg", "question": "q", "answer": "a"}]


def test_cells_of_several_lines_and_quotes_stay(tmp_path):
    (tmp_path / "t.csv").write_text('image,question,answer\n1.jpg,"a ""b"", c","x\ny, z"\n')
    assert list(read_table(tmp_path / "t.csv")) == [{"image": "1.jpg", "question": 'a "b", c', "answer": "x\ny, z"}]
