"""Where each assistant turn stands in a conversation that a chat template wrote.

The conversation is rendered a second time with a mark in the place of each thing that an assistant says. What stands between the marks
is the template's; laid over the real text it shows where the real words are. So no template needs generation markers, and one that
writes earlier turns in another way than the last (thinking templates do) is no obstacle.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlm_dist.data.messages import says_something
from vlm_dist.data.thoughts import CLOSING, thought_of, without_lost_thought
from vlm_dist.errors import BadSample

Messages = list[dict[str, Any]]
Render = Callable[..., str]
"""render(messages, add_generation_prompt=False) -> text; raises BadSample."""
Holes = dict[int, list[tuple[int, int]]]
"""turn -> (start, end) in the text of each thing said in it."""

MARK = re.compile("\ue000([0-9]+)\ue001")
STRIPS: tuple[Callable[[str], str], ...] = (
    lambda text: text, str.strip, str.lstrip, str.rstrip, lambda text: text.strip("\n"), lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)  # fmt: skip
"""What templates do to the space around a text."""


class Turn(NamedTuple):
    """An assistant turn, as (start, end) in the text: what the assistant writes, its end-of-turn included."""

    number: int
    start: int
    end: int


@dataclass(frozen=True)
class Habits:
    """What a template writes around an assistant's words, seen on a conversation of two turns."""

    lead: str = ""
    """Between the generation prompt and the words. Spaces are the model's to write; anything else is an empty thought, the template's."""
    tail: str = ""
    """Behind the words of the last turn, without trailing spaces: the end-of-turn."""
    takes_reasoning: bool = False
    """Whether it writes a turn's `reasoning_content`."""

    @property
    def opens_thought(self) -> bool:
        """Whether the words of a turn without reasoning stand behind more than the generation prompt."""
        return bool(self.lead.strip())


def habits_of(render: Render) -> Habits:
    """Look at how a template renders one question and one answer. Where it cannot, there is nothing to know."""
    question: Messages = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    answer: Messages = [{"role": "assistant", "content": [{"type": "text", "text": _mark(0)}]}]
    try:
        before, full = render(question, add_generation_prompt=True), render([*question, *answer])
    except BadSample:
        return Habits()
    found = MARK.search(full)
    if found is None:
        return Habits()
    lead = full[len(before) : found.start()] if full[: found.start()].startswith(before) else ""
    return Habits(lead, full[found.end() :].rstrip(), _writes_reasoning(question, render))


def _writes_reasoning(question: Messages, render: Render) -> bool:
    try:
        return _mark(0) in render([*question, _thinking_answer()])
    except BadSample:
        return False


def _thinking_answer() -> dict[str, Any]:
    return {"role": "assistant", "reasoning_content": _mark(0), "content": [{"type": "text", "text": _mark(1)}]}


def assistant_turns(
    messages: Messages, text: str, render: Render, habits: Habits, tokens: frozenset[str], last_only: bool = False
) -> list[Turn]:
    """Every assistant turn that says something in the text, or the last of them.

    Args:
        messages: as they were rendered.
        text: what `render(messages)` gave.
        tokens: control tokens, of which one ends a turn.

    Raises:
        BadSample: the template leaves out what an assistant says, or rewrites it beyond recognition.
    """
    _check_marks(text)
    speaking = [number for number, message in enumerate(messages) if message["role"] == "assistant" and says_something(message)]
    messages = [without_lost_thought(one, text) for one in messages]
    if len(speaking) == 1 and (start := _only_answer(messages, speaking[0], text, habits)) is not None:
        return [Turn(speaking[0], start, len(text.rstrip()))]
    tries = ({"calls": True}, {}, {"thoughts_apart": True})
    holes = next((found for one in tries if (found := _find_holes(messages, text, render, **one)) is not None), None)
    turns: list[Turn] = []
    for number in speaking[-1:] if last_only else speaking:
        places = holes.get(number) if holes is not None else None
        if holes is not None and places is None and not messages[number].get("tool_calls"):
            continue  # a thought without words, which the template leaves out
        span = _span_of(messages, number, text, holes, habits) if holes is not None and places else None
        if span is None:
            turns.append(
                _by_prefix(messages, number, text, render, habits) or _by_replacing(messages, number, text, render, habits, tokens)
            )
            continue
        start, end = span
        if habits.lead and not habits.opens_thought and text[:start].endswith(habits.lead):
            start -= len(habits.lead)
        turns.append(Turn(number, start, _with_end(text, end, number + 1 == len(messages), habits, tokens)))
    return turns


def _only_answer(messages: Messages, number: int, text: str, habits: Habits) -> int | None:
    """Where the only answer, at the end of a conversation, begins, where its words stand but once in the text, before the end-of-turn: no
    second rendering is needed to find it."""
    message = messages[number]
    is_plain = number + 1 == len(messages) and not message.get("reasoning_content") and not message.get("tool_calls")
    if not (is_plain and habits.tail and len(message["content"]) == 1):
        return None
    words = message["content"][0].get("text", "")
    start = len(text.rstrip()) - len(habits.tail) - len(words)
    if not words.strip() or CLOSING in words or text.count(words) != 1 or not text.startswith(words + habits.tail, max(start, 0)):
        return None
    return start - len(habits.lead) if habits.lead and not habits.opens_thought and text[:start].endswith(habits.lead) else start


def _span_of(messages: Messages, number: int, text: str, holes: Holes, habits: Habits) -> tuple[int, int] | None:
    """From the first thing said in a turn to the last, its tool calls included; None: those do not stand behind its words."""
    start, said = min(start for start, _ in holes[number]), max(end for _, end in holes[number])
    names = names_of(messages[number].get("tool_calls"))
    if not names:
        return start, said
    is_last = number + 1 == len(messages)
    end = len(text) if is_last else text.find(habits.tail, said) if habits.tail else -1
    following = [start for turn, found in holes.items() if turn > number for start, _ in found]
    if end < 0 or end > min(following, default=len(text)) or not all(name in text[said:end] for name in names):
        return None
    return start, said if is_last else end


def _check_marks(text: str) -> None:
    if found := MARK.search(text):
        raise BadSample(f"a text has the private characters {found[0]!a}, by which turns are located; write it without them")


def prompt_before_answer(messages: Messages, render: Render, reasoning: bool) -> str:
    """The text up to where the assistant's words begin in training: its thought, or behind the empty one that a thinking template writes
    before an answer without."""
    answer = _thinking_answer() if reasoning else {"role": "assistant", "content": [{"type": "text", "text": _mark(0)}]}
    _check_marks(render(messages))
    full = render([*messages, answer])
    found = MARK.search(full)
    if found is None:
        raise BadSample("the chat template leaves out what the assistant says")
    return full[: found.start()]


def names_of(tools: Any) -> list[str]:
    """The names of functions, in OpenAI's form or without its wrapping."""
    inner = [tool.get("function", tool) for tool in tools or () if isinstance(tool, dict)]
    return [tool["name"] for tool in inner if isinstance(tool, dict) and isinstance(tool.get("name"), str)]


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _find_holes(messages: Messages, text: str, render: Render, *, thoughts_apart: bool = False, calls: bool = False) -> Holes | None:
    """None: the real text does not lie between the template's pieces."""
    marked, said = _with_marks(messages, thoughts_apart, calls)
    try:
        pieces = MARK.split(render(marked))
    except BadSample:
        return None
    numbers = [int(number) for number in pieces[1::2]]
    present = set(numbers)
    for number, (turn, words, needed) in enumerate(said):
        if needed and words.strip() and number not in present:
            raise BadSample(f"the chat template leaves out what the assistant says in turn {turn}: {words.strip()[:60]!r}")
    if numbers != sorted(present) or not present <= set(range(len(said))) or not text.startswith(pieces[0]):
        return None
    places: Holes = {}
    position = len(pieces[0])
    for number, piece in zip(numbers, pieces[2::2], strict=True):
        turn, words, _ = said[number]
        fits = (form for strip in STRIPS if text.startswith((form := strip(words)) + piece, position))
        form = next(fits, None)
        if form is None:
            return None
        if form.strip() or (not words and messages[turn].get("tool_calls")):
            places.setdefault(turn, []).append((position, position + len(form)))
        position += len(form) + len(piece)
    return places if position == len(text) else None


def _with_marks(messages: Messages, thoughts_apart: bool, calls: bool) -> tuple[Messages, list[tuple[int, str, bool]]]:
    """Messages with marks for what assistants say; of each mark the turn, the words, and whether it must be in the text (a template may
    leave the thoughts of earlier turns out)."""
    said: list[tuple[int, str, bool]] = []
    marked = []

    def mark(turn: int, words: str, needed: bool = True) -> str:
        said.append((turn, words, needed))
        return _mark(len(said) - 1)

    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            marked.append(message)
            continue
        copy = dict(message)
        if str(message.get("reasoning_content") or "").strip():
            copy["reasoning_content"] = mark(number, message["reasoning_content"], needed=False)
        parts = []
        for part in message["content"]:
            if not part.get("text", "").strip():
                parts.append(part)
                continue
            thought = thought_of(part["text"]) if thoughts_apart else None
            if thought and thought.words:
                before = thought.before + mark(number, thought.words, needed=False) + thought.behind
                parts.append({**part, "text": before + mark(number, thought.rest)})
            else:
                parts.append({**part, "text": mark(number, part["text"])})
        if calls and message.get("tool_calls") and not any("text" in part for part in parts):
            parts.append({"type": "text", "text": mark(number, "", needed=False)})  # where the calls begin
        marked.append({**copy, "content": parts})
    return marked, said


def _with_end(text: str, end: int, is_last: bool, habits: Habits, tokens: frozenset[str]) -> int:
    """Where the end-of-turn behind `end` ends."""
    if is_last:
        return max(end, len(text.rstrip()))
    behind = text[end:]
    spaces = len(behind) - len(behind.lstrip())
    if habits.tail and behind.startswith(habits.tail):
        return end + len(habits.tail)
    closing = max((token for token in tokens if behind[spaces:].startswith(token)), key=len, default=None)
    return end if closing is None else end + spaces + len(closing)


def _by_prefix(messages: Messages, number: int, text: str, render: Render, habits: Habits) -> Turn | None:
    """A turn as what it adds to the conversation before it: with tool calls, or where the template rewrites an answer's words. None: the
    template writes this turn or those before it in another way once others follow."""
    try:
        before = render(messages[:number], add_generation_prompt=True) if number else ""
        after = render(messages[: number + 1]) if number + 1 < len(messages) else text
    except BadSample:
        return None
    if not (after.startswith(before) and text.startswith(after.rstrip())):
        return None
    is_empty_thought = habits.opens_thought and after.startswith(habits.lead, len(before))
    return Turn(number, len(before) + is_empty_thought * len(habits.lead), len(after.rstrip()))


def _by_replacing(messages: Messages, number: int, text: str, render: Render, habits: Habits, tokens: frozenset[str]) -> Turn:
    """A turn as what changes when it says a mark and nothing else: with tool calls, on templates that write earlier turns anew.

    Raises:
        BadSample: more changes than that.
    """
    turn: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": _mark(1)}]}
    if str(messages[number].get("reasoning_content") or "").strip():
        turn["reasoning_content"] = _mark(0)
    answered = [{**one, "content": [{"type": "text", "text": _mark(2)}]} if one["role"] == "tool" else one for one in messages]
    try:
        before, *_, behind = MARK.split(render([*messages[:number], turn, *messages[number + 1 :]]))
        with_answers = render(answered)
    except (BadSample, ValueError):  # ValueError: no mark, so nothing behind it
        before, behind, with_answers = "", "\ue002", ""
    start, end = len(before), len(text) - len(behind)
    said = text[start:end]
    is_whole = text.startswith(before) and text.endswith(behind) and start <= end
    words = [part["text"].strip() for part in messages[number]["content"] if "text" in part]
    is_all = all(one in said for one in [*words, *names_of(messages[number].get("tool_calls"))])
    if not (is_whole and is_all and said in with_answers):
        raise BadSample(
            f"the chat template writes turn {number} in several pieces or in other words, so it cannot be located; "
            "leave out the words beside its tool calls, or use single-turn samples"
        )
    return Turn(number, start, _with_end(text, end, number + 1 == len(messages), habits, tokens))
