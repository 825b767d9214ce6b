"""Nothing of a record is lost or read in another way in silence: keys that stand twice, quotes left open, numbers of options, thoughts
that are not whole, space around texts."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from scripts.templates_table import template
from tests.data.test_odd_data import picture, sample, write
from vlm_dist.cli.main import main
from vlm_dist.data.encode import IGNORED, Encoder
from vlm_dist.data.layouts import Columns, canonical
from vlm_dist.data.messages import read_messages
from vlm_dist.data.pack_files import read_records
from vlm_dist.data.pack_sources import open_source
from vlm_dist.data.samples import Sample, parse_sample
from vlm_dist.data.thoughts import leading_thought, without_generated_thought, without_thought
from vlm_dist.errors import BadSample, DataError
from vlm_dist.scoring.evaluate import right_answers

TWICE = '{"image": "0.jpg", "question": "q", "answer": "a", "answer": "b"}'
ONCE = '{"image": "0.jpg", "question": "q", "answer": "a", "answer": "a"}'
WHY = "the key 'answer' stands twice, with 'a' and with 'b'"


def parsed(record: dict | str, **more: bytes) -> Sample:
    text = record if isinstance(record, str) else json.dumps(record)
    raw = {"__key__": "s", "__url__": "x.tar", "jpg": picture(), "json": text.encode(), **more}
    return parse_sample(raw, max_image_pixels=100_000, caption_prompt="?")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.jsonl", f"{ONCE}\n{TWICE}\n{ONCE}\n"),
        ("r.json", f"[{ONCE}, {TWICE}, {ONCE}]"),
        ("r.json", f'{{"data": [{ONCE}, {TWICE}, {ONCE}]}}'),
    ],
)
def test_a_record_that_says_two_things_is_left_out(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    first, odd, last = read_records(tmp_path / name)
    assert first == last and isinstance(odd, BadSample) and WHY in str(odd)


def test_keys_that_stand_twice_elsewhere(tmp_path):
    (tmp_path / "by_picture.json").write_text('{"0.jpg": ["a"], "1.jpg": ["b"], "0.jpg": ["c"]}')
    odd, *others = read_records(tmp_path / "by_picture.json")
    assert "'0.jpg' stands twice, with ['a'] and with ['c']" in str(odd) and others == [{"image": "1.jpg", "captions": ["b"]}]
    (tmp_path / "one.json").write_text(TWICE)
    (odd,) = read_records(tmp_path / "one.json")
    assert WHY in str(odd)
    with pytest.raises(BadSample, match="json: the key 'content' stands twice"):
        parsed('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]}')
    with pytest.raises(BadSample, match="'content' stands twice"):  # of a table's cell
        canonical({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "content": "b"}]'})
    assert parsed(ONCE).messages[-1]["content"][0]["text"] == "a"


def test_a_quote_left_open_loses_its_line_alone(tmp_path):
    (tmp_path / "t.csv").write_text('image,question,answer\n1.jpg,q,a\n2.jpg,"open,a\n3.jpg,q,b\n4.jpg,q,c\n')
    first, odd, *others = read_records(tmp_path / "t.csv")
    assert "'t.csv' line 3: a quote opens a cell and none closes it" in str(odd)
    assert [row["image"] for row in (first, *others)] == ["1.jpg", "3.jpg", "4.jpg"]
    (tmp_path / "t.tsv").write_text("image\tquestion\tanswer\n" + '1.jpg\t"open\ta\n' * 150)
    rows = list(read_records(tmp_path / "t.tsv"))
    assert rows and all(isinstance(row, BadSample) for row in rows)


def records(tmp_path, rows: list[dict]) -> str:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "0.jpg")
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"image": "0.jpg", "question": f"q{number}?", **row} for number, row in enumerate(rows)]))
    return str(path)


OPTIONS = ["cat", "dog", "hen"]


def test_options_that_are_counted_from_one(tmp_path, capsys):
    source = records(tmp_path, [{"options": OPTIONS, "answer": answer} for answer in (1, 2, "3", 3.0)])
    assert main(["data", "pack", source, str(tmp_path / "a")]) == DataError.exit_code
    said = capsys.readouterr().err
    assert "none of those looked at is 0, and 2 of 4 are as high as there are options; --options-from 1" in said
    assert main(["data", "pack", source, str(tmp_path / "b"), "--options-from", "1", "--processes", "1"]) == 0
    assert "answers: numbers of options, counted from 1 (4 looked at, the lowest 1)" in capsys.readouterr().out
    made = [canonical(record, Columns(options_from=1))["messages"][-1]["content"] for record in open_source(source)]
    assert made == ["A", "B", "C", "C"]
    with pytest.raises(BadSample, match="the answer 4 is none of the options 1, 2, 3, counted from 1"):
        canonical({"image": "0.jpg", "question": "q", "options": OPTIONS, "answer": 4}, Columns(options_from=1))
    texts = {"image": "0.jpg", "question": "q", "options": ["10", "20"], "answer": "20"}
    assert canonical(texts, Columns(options_from=1))["answers"] == ["20"]


def test_options_that_are_counted_from_zero_are_told(tmp_path, capsys):
    source = records(tmp_path, [{"options": OPTIONS, "answer": answer} for answer in (0, 2.0)])
    assert main(["data", "pack", source, str(tmp_path / "a"), "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "counted from 0 (2 looked at, the lowest 0); --options-from 1 says otherwise" in said
    assert "how they are read: the number of an option, counted from 0 (2 samples)" in said


@pytest.mark.parametrize(
    ("answer", "said", "told"),
    [
        (1, "B", "the number of an option, counted from 0"),
        ("1.0", "B", "the number of an option, counted from 0"),
        ("B", "B", None),
        ("dog", "dog", None),
        ("b", "B", None),
        ("(B)", "B", None),
        ("B.", "B", None),
        ("Answer: B", "Answer: B", "other words than those of the options, as they stand"),
    ],
)
def test_how_an_answer_beside_options_is_read_is_told(answer, said, told):
    found = parsed({"question": "q", "options": OPTIONS, "answer": answer})
    assert found.messages[-1]["content"][0]["text"] == said
    assert [name for kind, name in found.notes if kind == "option"] == ([told] if told else [])


def test_truths_are_told():
    assert ("option", "true and false as yes and no") in parsed({"question": "q", "answer": False}).notes


DAMAGED = {
    "a\u200bcat": "characters that nobody sees", "caf\ufffd": "U+FFFD", "caf\u00c3\u00a9": "UTF-8 that was read",
    "a cat\\n": "escaped twice", "A &amp; B": "HTML's entities", "nan": "nan, None or null",
}  # fmt: skip


def test_texts_that_look_damaged_are_told():
    for text, words in DAMAGED.items():
        for record in ({"question": "q", "answer": text}, {"captions": [text, "b"]}):
            (found,) = (name for kind, name in parsed(record).notes if kind == "damage")
            assert words in found
    for text in ("\\nabla x", "none", "S\u00c3O", "\U0001f469\u200d\U0001f467", "caf\u00e9", "R&D; no"):
        assert not parsed({"question": "q", "answer": text}).notes


def test_classes_by_number_alone_are_told():
    assert ("number", "captions") in parsed({"image": "0.jpg", "label": "3"}).notes
    assert not parsed({"question": "How many?", "answer": 3}).notes


def test_an_empty_answer_is_told_as_one():
    with pytest.raises(BadSample, match="'answer' is '': nothing is answered"):
        canonical({"image": "0.jpg", "question": "q", "answer": ""})


def test_tables_as_pandas_splits_them(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"columns": ["image", "caption"], "index": [0], "data": [["0.jpg", "a"]]}))
    assert list(read_records(tmp_path / "a.json")) == [{"image": "0.jpg", "caption": "a"}]


@pytest.mark.parametrize(
    ("record", "lost"),
    [
        ({"question": "q", "answer": " a"}, {"spaces and line breaks"}),
        ({"question": "q\n", "answer": "a"}, {"spaces and line breaks"}),
        ({"captions": ["a ", "b"]}, {"spaces and line breaks"}),
        ({"conversations": [{"from": "human", "value": "<image>\nq\n"}, {"from": "gpt", "value": "a"}]}, {"line breaks of questions"}),
        ({"conversations": [{"from": "human", "value": "<image>\n\nq"}, {"from": "gpt", "value": "\na"}]},
         {"line breaks of questions", "line breaks"}),
        ({"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": " a "}]}, set()),
        ({"conversations": [{"from": "human", "value": "q\n<image>"}, {"from": "gpt", "value": "a"}]}, set()),
        ({"question": "q", "answer": "a"}, set()),
    ],
)  # fmt: skip
def test_space_that_is_taken_away_is_told(record, lost):
    assert {name for kind, name in parsed(record).notes if kind == "stripped"} == lost


def test_space_around_a_caption_file_is_told_but_not_its_line_end():
    def notes(text: bytes) -> set:
        return parse_sample({"__key__": "s", "jpg": picture(), "txt": text}, max_image_pixels=10_000, caption_prompt="?").notes

    assert not notes(b"a cat\r\n") and notes(b" a cat") == {("stripped", "spaces and line breaks")}


THOUGHTS = {
    "red": ("red", "red", []),
    "<think>\nhm\n</think>\n\nred": ("hm\n</think>\n\nred", "red", []),
    "hm</think>\nred": ("hm\n</think>\n\nred", "red", []),
    "</think>red": ("red", "red", []),
    "red</think>": ("red</think>", "red</think>", ["</think> within the words"]),
    "write </think> there": ("write </think> there", "write </think> there", ["</think> within the words"]),
    "x <think>y</think> z": ("x <think>y</think> z", "x <think>y</think> z", ["<think> within the words", "</think> within the words"]),
    "<think>red": ("<think>red", "<think>red", ["<think> without its end"]),
    "<think>a</think>\n<think>b</think>c": ("a\n</think>\n\n<think>b</think>c", "<think>b</think>c",
                                            ["<think> within the words", "</think> within the words"]),
    "<think>hm</think>": ("hm\n</think>\n\n", "", ["a thought without words behind it"]),
}  # fmt: skip


def test_thoughts_that_are_not_whole_are_words_and_told(checkpoint):
    """On a template that would look for a thought in the words: what is learnt, what is compared, what is told."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint("qwen3_5"))
    processor.chat_template = template("qwen3_5_think")
    encoder = Encoder(processor, 1024)
    for said, (learnt, truth, told) in THOUGHTS.items():
        turns = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": said}]
        given = parsed({"messages": turns})
        assert {name for kind, name in given.notes if kind == "thought"} == set(told), said
        encoded = encoder.encode(given)
        text = processor.tokenizer.decode(encoded.labels[0][encoded.labels[0] != IGNORED])
        assert text.removesuffix("<|im_end|>") == learnt, said
        assert right_answers(given) == ([truth] if truth else []) and without_generated_thought(learnt, truth) == (truth or learnt.strip())


def test_tags_alone_say_nothing():
    for said in ("</think>", "<think></think>", " <think> "):
        with pytest.raises(BadSample, match="the assistant says nothing"):
            parsed({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": said}]})
    assert leading_thought("a</think>b") is None and without_thought("a</think>b") == "a</think>b"
    assert without_generated_thought("hm</think>red", "red") == "red" and without_generated_thought("red</think>", "red") == "red</think>"


def test_words_that_a_template_rewrites_are_never_lost(checkpoint):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint("llava"))
    processor.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text | replace('red', 'blue') }}</s>{% endfor %}"
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "a red box"}]
    with pytest.raises(BadSample, match="writes in other words what the assistant says in turn 1: 'a red box'"):
        Encoder(processor, 512).encode(Sample("k", "s", read_messages(turns), []))


def test_questions_whose_space_a_template_takes_away_are_told(checkpoint):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint("qwen3_5"))
    processor.chat_template = template("qwen3_5_think")
    turns = [{"role": "user", "content": [{"type": "text", "text": " Which? "}]}, {"role": "assistant", "content": "red"}]
    notes = Encoder(processor, 512).encode(Sample("k", "s", read_messages(turns), [])).notes
    assert notes == {("stripped", "spaces and line breaks, by the chat template")}


def test_paths_are_named_by_what_was_asked_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    (tmp_path / "zero.jpg").touch()
    nowhere = str(tmp_path / "nowhere")
    monkeypatch.setattr("vlm_dist.serving.trained.load_trained", lambda *_, **__: pytest.fail("a model was loaded"))

    def said(*arguments: str) -> str:
        assert main([*arguments]) != 0
        return capsys.readouterr().err

    assert said("data", "verify", nowhere).startswith("vlm-dist: data verify: no shard matches")
    shard = write(tmp_path / "x.tar", sample("s"))
    assert said("data", "verify", shard, "--heldout", nowhere).startswith("vlm-dist: data verify --heldout: no shard matches")
    assert said("data", "pack", shard, str(tmp_path / "o"), "--heldout", "-1") == "vlm-dist: --heldout: found -1; expected 0 or more\n"
    assert "no adapter and no checkpoint" in said("generate", nowhere, "--prompt", "x")
    assert "no adapter and no checkpoint" in said("chat", nowhere, "--terminal")
    for command in (["generate", nowhere, "--prompt", "x"], ["chat", nowhere, "--terminal"]):
        assert "--image: '" in said(*command, "--image", str(tmp_path / "none.jpg"))
        assert said(*command, "--image", str(tmp_path / "zero.jpg")).count("JPEG, PNG or WebP") == 1
    (tmp_path / "odd.json").write_text(json.dumps([{"foo": 1}] + [{"image": "0.jpg", "caption": "a"}] * 3))
    main(["data", "pack", str(tmp_path / "odd.json"), str(tmp_path / "p"), "--dry-run"])
    assert "not recognised (1): no text in a layout that is known; its keys are foo\n" in capsys.readouterr().out
