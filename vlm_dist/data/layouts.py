"""Records as people have them -> one form, whatever trainer or data set they were made for; docs/data.md has the table of them.

`canonical` opens no file and raises nothing but BadSample, whatever JSON value stands where. To read another layout, add a row to LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlm_dist.data import layout_kinds as kinds
from vlm_dist.data.layout_boxes import with_objects
from vlm_dist.data.layout_keys import ANSWERS, CAPTIONS, KNOWN, QUESTIONS
from vlm_dist.data.layout_lists import looks_like_turns
from vlm_dist.data.layout_names import in_known_names
from vlm_dist.data.layout_options import with_letter_from_one
from vlm_dist.data.layout_values import columns_in, is_present, keys_of, parsed, shown, texts_of
from vlm_dist.data.layout_videos import with_videos
from vlm_dist.errors import BadSample

WRAPPING = ("text", "json", "record", "data", "sample", "row", "example", "item")
WITH_QUESTIONS = ("messages", "conversations", "pairs of texts", "question and answer", "query and response", "Alpaca")
PREFERENCE = (("chosen", "rejected"), ("chosen_response", "rejected_response"))


@dataclass(frozen=True)
class Columns:
    """Which keys hold what, where the user says so."""

    question: str | None = None
    answer: str | None = None
    image: str | None = None
    boxes: str | None = None
    """What the numbers of boxes mean: one of `layout_boxes.FORMS`."""
    options_from: int | None = None
    """What the first option's number is, 0 or 1, where answers are numbers; None: 0."""

    @property
    def named(self) -> list[str]:
        """The keys named."""
        return [key for key in (self.question, self.answer, *(self.image or "").split(",")) if key]


@dataclass(frozen=True)
class Layout:
    """A way to write a record."""

    name: str
    keys: str
    """What it is recognised by, in words."""
    fits: Callable[[dict[str, Any]], bool]
    convert: Callable[[dict[str, Any], str | None], dict[str, Any]]
    """(record, the column of pictures that the user names) -> the canonical record."""


def canonical(record: Any, columns: Columns | None = None) -> dict[str, Any]:
    """One form for every record.

    Returns:
        `messages` (turns of role user, assistant, system or tool, with text in which `<image>` and `<video>` stand for one, or typed
        parts; the turns' other keys as they were) or `captions` ([texts]) or, of boxes without words, neither; `images` and `videos`
        (sources, in order of appearance); `answers` ([texts]), `tools` and `objects` where there are any; every other key as it was.

    Raises:
        BadSample: no layout that is known, or what it holds is unusable; says the keys found and the layouts known.
    """
    record = unwrapped(as_object(record))
    pair = next((pair for pair in PREFERENCE if all(is_present(record.get(key)) for key in pair)), None)
    if pair is not None:
        raise BadSample(f"a pair of answers ('{pair[0]}', '{pair[1]}') to choose from; make the better one the last turn, alone")
    columns = columns or Columns()
    record = in_known_names(record, KNOWN, columns.named)
    record = with_letter_from_one(record) if columns.options_from == 1 else record
    record = with_objects({**record, "bbox_format": columns.boxes} if columns.boxes else record)
    if columns.named:
        return _finished(_by_columns(record, columns), record)
    layout = _first(record)
    if layout is not None and layout.name == "question and answer" and kinds.has_one_box(record):
        if columns.boxes is None:
            raise BadSample("a question with its answer beside a box: `data pack --question KEY` reads the question, --boxes FORM the box")
        layout = next(one for one in LAYOUTS if one.convert is kinds.from_box)
    if layout is None and record.get("objects") == []:
        raise BadSample("'objects' marks nothing in the picture, and there is no text")
    empty = [key for key in (*ANSWERS, *CAPTIONS) if key in record and not texts_of(record[key])] if layout is None else []
    if empty and any(texts_of(record.get(key)) for key in QUESTIONS):
        raise BadSample(f"'{empty[0]}' is {shown(record[empty[0]])}: nothing is answered; its keys are {keys_of(record)}")
    if layout is None:
        known = "; ".join(f"{known.name} ({known.keys})" for known in LAYOUTS)
        raise BadSample(f"no text in a layout that is known; its keys are {keys_of(record)}; known are {known}; or name columns: --answer")
    kinds.refuse_rivals(record, layout.name)
    return _finished(layout.convert(record, None), record)


def layout_of(record: dict[str, Any]) -> Layout | None:
    """The first layout that fits; None: none does, or what the record says is not clear."""
    try:
        return _first(with_objects(in_known_names(record, KNOWN)))
    except BadSample:
        return None


def _first(record: dict[str, Any]) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.fits(record)), None)


def as_object(record: Any) -> dict[str, Any]:
    """A bare list of turns -> an object with them.

    Raises:
        BadSample: neither that nor an object.
    """
    if isinstance(record, list) and looks_like_turns(record):
        return {"messages": record}
    if not isinstance(record, dict):
        raise BadSample(f"the record is {shown(record, 60)}; expected an object")
    return record


def unwrapped(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose text is a record, as an object or as JSON, with that in its place."""
    for key in WRAPPING:
        value = record.get(key)
        value = parsed(value) if isinstance(value, str) and value.lstrip()[:1] == "{" else value
        if not isinstance(value, dict):
            continue
        layout = layout_of(value)
        if any(all(is_present(value.get(name)) for name in pair) for pair in PREFERENCE) or (layout and layout.name in WITH_QUESTIONS):
            return {**kinds.without(record, [key]), **value}
    return record


def _by_columns(record: dict[str, Any], columns: Columns) -> dict[str, Any]:
    images = columns_in(columns.image, record) if columns.image else []
    missing = [name for name in (columns.question, columns.answer, *images) if name is not None and name not in record]
    if missing:
        raise BadSample(f"the record has no '{missing[0]}'; its keys are {keys_of(record)}")
    if columns.question is not None:
        return kinds.asked_by(record, columns.question, [columns.answer] if columns.answer else list(kinds.ANSWERS), columns.image)
    if columns.answer is not None:
        return kinds.captions_from(record, [columns.answer], columns.image)
    layout = _first({**record, "image": record[images[0]]})
    if layout is not None:
        kinds.refuse_rivals(record, layout.name)
    else:
        raise BadSample(f"no text in a layout that is known; its keys are {keys_of(record)}; name the column of texts: --answer")
    return layout.convert(record, columns.image)


def _finished(made: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """What changes the meaning is kept in one form, or refused."""
    other = next((key for key in ("audio", "audios") if is_present(record.get(key))), None)
    if other is not None:
        raise BadSample(f"'{other}' is {shown(record[other], 40)}; only pictures, videos and text are read")
    made = with_videos(made, record)
    unwanted = [key for key in ("kto_tag", "label") if record.get(key) is False and (key == "kto_tag" or "label" in made)]
    if unwanted:
        raise BadSample(f"'{unwanted[0]}' is false: an answer that is not wanted; leave such records out")
    for key, expected in (("messages", "a list of turns"), ("captions", "a list of texts")):
        if key in made and made[key] is record.get(key) and (key == "messages" or "messages" not in made):  # not what the layout read
            if is_present(made[key]):
                raise BadSample(f"'{key}' is {shown(made[key])}; expected {expected}")
            made = kinds.without(made, [key])
    if "answers" in made:
        answers = texts_of(made["answers"])
        if is_present(made["answers"]) and not answers:
            raise BadSample(f"'answers' is {shown(made['answers'])}; expected a list of texts")
        made = {**made, "answers": answers} if answers else kinds.without(made, ["answers"])
    if "tools" not in made and isinstance(made.get("functions"), list) and "messages" in made:
        made = {**kinds.without(made, ["functions"]), "tools": [{"type": "function", "function": tool} for tool in made["functions"]]}
    if "tools" in made:
        tools = parsed(made["tools"]) if isinstance(made["tools"], str) and made["tools"].strip() else made["tools"]
        tools = [tools] if isinstance(tools, dict) else tools
        if is_present(made["tools"]) and not isinstance(tools, list):
            raise BadSample(f"'tools' is {shown(made['tools'])}; expected a list of tools")
        made = {**made, "tools": tools} if tools else kinds.without(made, ["tools"])
    return made


LAYOUTS = (
    Layout("messages", "messages, or a bare list of turns", kinds.is_messages, kinds.from_turns),
    Layout("conversations", "conversations, conversation, chat, dialog, turns, qa", kinds.is_conversation, kinds.from_turns),
    Layout("pairs of texts", "texts: [{user, assistant}]", lambda record: looks_like_turns(record.get("texts")), kinds.from_pairs),
    Layout("ground truth", "ground_truth: gt_parse", kinds.has_ground_truth, kinds.from_ground_truth),
    Layout("prompt and completion", "prompt, completion; prompt or input with turns, answer or output", kinds.is_prompt, kinds.from_prompt),
    Layout("Alpaca", "instruction, input, output", kinds.is_alpaca, kinds.from_alpaca),
    Layout("query and response", "query, response, history", kinds.is_query, kinds.from_query),
    Layout("question and answer", "question, query, prefix; answer, answers, label, suffix; options", kinds.is_asked, kinds.from_question),
    Layout("box and expression", "bbox; sentences, expression or caption", kinds.is_boxed, kinds.from_box),
    Layout("captions", "caption, captions, text or sentences", lambda record: bool(kinds.caption_keys(record)), kinds.from_captions),
    Layout("objects", "objects, or points with a label", kinds.has_objects, kinds.from_objects),
)
