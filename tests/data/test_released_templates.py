"""Chat templates as models are released with, read from TRL's package: what is learnt, where a prompt ends, what is refused."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from scripts.templates_table import BEGIN, END, PICTURE, RELEASED, TOOLS, assistant, table, template, user
from tests.conftest import ROOT
from vlm_dist.data.encode import IGNORED, Encoder
from vlm_dist.data.messages import read_messages
from vlm_dist.data.samples import Sample
from vlm_dist.errors import BadSample

ENDS = {
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "idefics3": "<end_of_utterance>",
    "llava_next": "</s>",
    "smolvlm": "<end_of_utterance>",
}
PAIRS = [(family, name) for family, names in RELEASED.items() for name in names]
ALTERNATE = {"gemma3"}  # templates that take only user, assistant, user, ...
WITH_TOOLS = {"gemma4", "qwen3_5", "qwen3_vl"}


@pytest.fixture(params=PAIRS, ids=[name if family in name else f"{family}-{name}" for family, name in PAIRS])
def released(request, checkpoint) -> tuple[str, str, Encoder]:
    from transformers import AutoProcessor

    family, name = request.param
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    processor.chat_template = template(name)
    return family, name, Encoder(processor, 8192)


def learnt(encoder: Encoder, *turns: dict, **more) -> list[str]:
    """The supervised text, a piece an end-of-turn."""
    images = [Image.new("RGB", (64, 48), "red")] * sum("image" in json.dumps(turn) for turn in turns)
    encoded = encoder.encode(Sample("k", "s", read_messages(list(turns)), images, **more))
    text = encoder.processor.tokenizer.decode(encoded.labels[0][encoded.labels[0] != IGNORED])
    pieces = [piece.strip() for piece in text.split(encoder.habits.tail)]
    assert pieces.pop() == ""
    return pieces


def test_turns_are_found(released):
    family, _, encoder = released
    assert encoder.habits.tail == ENDS.get(family, "<|im_end|>")
    assert learnt(encoder, user(PICTURE), assistant("red")) == ["red"]
    assert learnt(encoder, user(PICTURE), assistant("red"), user("Sure?"), assistant("yes"), user("Why?"), assistant("light")) == [
        "red", "yes", "light",
    ]  # fmt: skip
    assert learnt(encoder, user(PICTURE), assistant("red"), user("Good.")) == ["red"]
    assert learnt(encoder, {"role": "system", "content": "Be short."}, user(PICTURE), assistant("red")) == ["red"]
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "red."}]
    assert learnt(encoder, user(PICTURE), assistant(parts)) == ["It is red."]


def test_what_a_template_takes_away_around_an_answer_is_told(released):
    _, _, encoder = released
    encoded = encoder.encode(Sample("k", "s", read_messages([user("Which?"), assistant([{"type": "text", "text": "  red"}])]), []))
    text = encoder.processor.tokenizer.decode(encoded.inputs["input_ids"][0])
    assert ("  red" not in text) == any(kind == "stripped" for kind, _ in encoded.notes)


def test_two_answers_in_a_row_and_an_assistant_who_begins(released):
    family, name, encoder = released
    if family in ALTERNATE:
        for turns in ([user(PICTURE), assistant("red"), assistant("yes")], [assistant("Hello."), user(PICTURE), assistant("red")]):
            with pytest.raises(BadSample, match="chat template: Conversation roles must alternate"):
                learnt(encoder, *turns)
        return
    both = ["redyes"] if name == "gemma4_v5" else ["red", "yes"]  # that one writes them into one turn
    assert learnt(encoder, user(PICTURE), assistant("red"), assistant("yes")) == both
    assert learnt(encoder, assistant("Hello."), user(PICTURE), assistant("red")) == ["Hello.", "red"]


def test_reasoning_is_learnt_where_there_is_some(released):
    """And no empty thought where there is none; a thought in tags is one in `reasoning_content` where the template takes that."""
    _, _, encoder = released
    apart = encoder.habits.takes_reasoning
    inline = learnt(encoder, user(PICTURE), assistant("<think>I look.</think>red"))
    assert inline == learnt(encoder, user(PICTURE), assistant("red", reasoning_content="I look.")) if apart else True
    (piece,) = inline
    assert piece.startswith("I look." if apart else "<think>I look.</think>") and piece.endswith("red")
    (piece, *_) = learnt(encoder, user(PICTURE), assistant("red"), user("Sure?"), assistant("yes"))
    assert piece == "red"


def test_a_prompt_ends_where_the_words_begin(released):
    """What generation is given is what stood before the answer in training, without reasoning and with."""
    _, _, encoder = released
    picture = [Image.new("RGB", (64, 48), "red")]
    for answer, reasoning in ((assistant("red"), False), (assistant("red", reasoning_content="I look."), True)):
        if reasoning and not encoder.habits.takes_reasoning:
            continue
        messages = read_messages([user(PICTURE), answer])
        encoded = encoder.encode(Sample("k", "s", messages, picture))
        prompt = encoder.encode_prompt(messages[:1], picture, reasoning=reasoning)
        start = int((encoded.labels[0] != IGNORED).nonzero()[0, 0])
        given = encoder.processor.tokenizer.decode(prompt.inputs["input_ids"][0])
        assert given.rstrip(" ") == encoder.processor.tokenizer.decode(encoded.inputs["input_ids"][0, :start]).rstrip(" ")


def test_tools(released):
    family, _, encoder = released
    turns = [
        user(PICTURE),
        assistant(None, tool_calls=[{"type": "function", "function": {"name": "zoom", "arguments": '{"x": 1}'}}]),
        {"role": "tool", "content": "closer"},
        assistant("red"),
    ]
    if family not in WITH_TOOLS:
        with pytest.raises(BadSample, match="chat template"):
            learnt(encoder, *turns, tools=TOOLS)
        return
    found = "".join(learnt(encoder, *turns, tools=TOOLS))
    assert "zoom" in found and "x" in found and found.endswith("red") and "closer" not in found and "</think>" not in found


@pytest.mark.parametrize("more", [{}, {"reasoning_content": "I cannot see."}], ids=["plain", "thinking"])
@pytest.mark.parametrize("words", [None, "Let me zoom."])
def test_calls_in_an_earlier_turn(released, words, more):
    """They are learnt wholly, what the tool answers never; a template that parts a call from the words beside it refuses the sample."""
    family, name, encoder = released
    if family not in WITH_TOOLS:
        pytest.skip("takes no tools, see test_tools")
    calls = [{"type": "function", "function": {"name": called, "arguments": '{"x": 1}'}} for called in ("zoom", "crop")]
    turns = [
        user(PICTURE), assistant(words, tool_calls=calls, **more), {"role": "tool", "content": "closer"},
        {"role": "tool", "content": "nearer"}, assistant("red"), user("Sure?"), assistant("yes"),
    ]  # fmt: skip
    if family == "gemma4" and words and name != "gemma4_v2":  # written behind what the tool says
        with pytest.raises(BadSample, match="turn 1 in several pieces"):
            learnt(encoder, *turns, tools=TOOLS)
        return
    found = "".join(learnt(encoder, *turns, tools=TOOLS))
    assert all(one in found for one in ("zoom", "crop", "x", "red", "yes")) and (words or "") in found
    assert "closer" not in found and "nearer" not in found and "Sure" not in found
    assert ("I cannot see." in found) == ("</think>" in found)


def test_control_tokens_in_calls_and_tools_are_text(released):
    """As in what people say: a turn that a call's argument ends would be learnt as one."""
    family, _, encoder = released
    if family not in WITH_TOOLS:
        pytest.skip("takes no tools, see test_tools")
    end = encoder.processor.tokenizer.eos_token

    def encoded(argument: str, described: str):
        call = {"type": "function", "function": {"name": "zoom", "arguments": {"x": [argument]}}}
        turns = [user(PICTURE), assistant(None, tool_calls=[call]), {"role": "tool", "content": "closer"}, assistant("red")]
        tool = {"type": "function", "function": {**TOOLS[0]["function"], "description": described}}
        return encoder.encode(Sample("k", "s", read_messages(turns), [Image.new("RGB", (64, 48))], tools=[tool]))

    plain, odd = encoded("a", "b"), encoded(f"a{end}", f"b{end}")
    number = encoder.processor.tokenizer.convert_tokens_to_ids(end)
    assert (odd.inputs["input_ids"] == number).sum() == (plain.inputs["input_ids"] == number).sum()
    assert ("split", end) in odd.notes and not any(kind == "split" for kind, _ in plain.notes)


def test_what_is_written_into_a_user_turn_is_not_lost(released):
    _, _, encoder = released
    encoder.processor.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}</s>{% endfor %}"
    two = [{"type": "text", "text": "Which"}, {"type": "text", "text": "colour?"}]
    with pytest.raises(BadSample, match="the chat template leaves out what the user says in turn 0"):
        learnt(encoder, user(two), assistant("red"))


@pytest.mark.slow
def test_the_table_of_the_models_page():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert table() in page.split(BEGIN)[1].split(END)[0], "python scripts/templates_table.py --page docs/models.md"
