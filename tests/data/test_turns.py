"""Turns are located by marks of their own, which no text may bring along."""

from __future__ import annotations

import pytest

from vlm_dist.data.turns import assistant_turns, habits_of, prompt_before_answer
from vlm_dist.errors import BadSample


def turn(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


def render(messages, add_generation_prompt=False):
    said = "".join(f"<{one['role']}>{one['content'][0]['text']}<end>" for one in messages)
    return said + "<assistant>" * add_generation_prompt


def spoken(messages):
    text = render(messages)
    return [text[start:end] for _, start, end in assistant_turns(messages, text, render, habits_of(render), frozenset({"<end>"}))]


@pytest.mark.parametrize("text", ["\ue0000\ue001 Why?", "\ue0001\ue001"])
def test_a_question_with_marks_of_ours_is_never_learnt(text):
    talk = [turn("user", "Which?"), turn("assistant", "red"), turn("user", text), turn("assistant", "light")]
    with pytest.raises(BadSample, match="private characters"):
        spoken(talk)
    with pytest.raises(BadSample, match="private characters"):
        prompt_before_answer(talk[:3], render, reasoning=False)


@pytest.mark.parametrize("words", ["red", " red ", "Which?", "red<end>", "<end>", "ASSISTANT"])
def test_one_answer_is_found_with_and_without_a_second_rendering(words, monkeypatch):
    talk, renderings = [turn("user", "Which? <end>"), turn("assistant", words)], []

    def counted(messages, add_generation_prompt=False):
        renderings.append(messages)
        return render(messages, add_generation_prompt)

    def found():
        return assistant_turns(talk, render(talk), counted, habits_of(render), frozenset({"<end>"}))

    quick = found()
    assert bool(renderings) == (words in ("Which?", "<end>"))
    monkeypatch.setattr("vlm_dist.data.turns._only_answer", lambda *_: None)
    assert quick == found() and renderings
    assert render(talk)[quick[0].start : quick[0].end] == f"{words}<end>"


def test_other_private_characters_stay():
    talk = [turn("user", "\ue000 Which?"), turn("assistant", "red \ue001"), turn("user", "\uf8ff"), turn("assistant", "red")]
    assert spoken(talk) == ["red \ue001<end>", "red<end>"]
