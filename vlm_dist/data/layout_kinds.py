"""The layouts of records: how each is recognised, and what it becomes. `layouts.py` has the table of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vlm_dist.data.layout_turns import Turns, looks_like_turns, spread, unpacked
from vlm_dist.data.layout_values import boxes_of, is_present, letter_of, pictures_of, question_with_options, shown, texts_of
from vlm_dist.data.layout_videos import whole_captions
from vlm_dist.errors import BadSample

TURN_KEYS = (
    "messages",
    "conversations",
    "conversation",
    "chat",
    "dialog",
    "dialogue",
    "dialogs",
    "turns",
    "contents",
    "qa_pairs",
    "qas",
    "qa",
)
QUESTIONS = ("question", "query", "prompt", "instruction", "problem", "questions", "user", "input", "q")
ANSWERS = (
    "multiple_choice_answer", "answer", "answers", "label", "labels", "response", "completion", "output", "solution", "target",
    "correct_choice_idx", "direct_answers", "assistant", "full_answer",
)  # fmt: skip
CAPTIONS = (
    "captions", "caption", "sentences", "texts", "text", "raw", "caption_str", "reference_strs", "alt_text", "description", "TEXT",
    "sentence", "txt", "comment", "class_name", "class", "label", "category",
)  # fmt: skip
EXPRESSIONS = (
    "expression", "expressions", "referring_expression", "ref_exp", "phrase", "phrases", "sentences", "captions", "caption", "sentence",
    "text", "description", "label", "labels", "category",
)  # fmt: skip
BOXES = ("bbox", "bbox_xyxy", "bbox_xywh", "box", "bboxes", "boxes")
SYSTEM = ("system", "system_prompt", "system_message")


def is_messages(record: dict[str, Any]) -> bool:
    return isinstance(record.get("messages"), list) or _are_turns(record.get("messages"))  # whatever is wrong in a list, it is meant


def is_conversation(record: dict[str, Any]) -> bool:
    return isinstance(record.get("conversations"), list) or any(_are_turns(record.get(key)) for key in TURN_KEYS[1:])


def _are_turns(value: Any) -> bool:
    value = unpacked(value)
    is_alternating = isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)
    return is_alternating or looks_like_turns(value)


def from_turns(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    key = next(key for key in TURN_KEYS if (isinstance(record.get(key), list) and key in TURN_KEYS[:2]) or _are_turns(record.get(key)))
    return _talk(record, unpacked(record[key]), [key], column)


def _talk(record: dict[str, Any], turns: Any, used: list[str], column: str | None, files: str | None = None) -> dict[str, Any]:
    """Turns, with what stands beside them: system, pictures."""
    turns, (pictures, held) = list(spread(turns)), pictures_of(record, column, files)
    system_keys = [key for key in SYSTEM if is_present(record.get(key))]
    made = Turns(turns, pictures)
    for key in reversed(system_keys):
        if not isinstance(record[key], str):
            raise BadSample(f"'{key}' is {shown(record[key])}; expected the text of the system prompt")
        _with_system(made.turns, record[key])
    rest = without(record, used, held, [key for key in SYSTEM if not is_present(record.get(key))], system_keys)
    return {**rest, "messages": made.turns, "images": made.images, "videos": made.videos}


def _with_system(turns: list[dict[str, Any]], words: str) -> None:
    """As the first turn; joined to a system turn that is there and says something else."""
    if turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": words})
        return
    said = turns[0]["content"]
    if isinstance(said, list) and not any(words.strip() in part.get("text", "") for part in said):
        turns[0]["content"] = [{"type": "text", "text": words}, *said]
    elif isinstance(said, str) and words.strip() not in said:
        turns[0]["content"] = f"{words}\n\n{said}"


def from_pairs(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    return _talk(record, record["texts"], ["texts"], column)


def from_prompt(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    turns: list[dict[str, Any]] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[key]
        turns += spread(unpacked(value)) if looks_like_turns(value) else [{"role": role, "content": value}]
    return _talk(record, turns, ["prompt", "completion"], column)


def is_prompt(record: dict[str, Any]) -> bool:
    return all(isinstance(record.get(key), str | list) and record[key] for key in ("prompt", "completion"))


def is_alpaca(record: dict[str, Any]) -> bool:
    return isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str)


def from_alpaca(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    more = record.get("input") if isinstance(record.get("input"), str) else None
    asked = "\n".join(text for text in (record["instruction"], more) if text and text.strip())
    return _pairs(
        record, asked, record["output"], ["instruction", "input", "output"] if more is not None else ["instruction", "output"], column
    )


def is_query(record: dict[str, Any]) -> bool:
    return isinstance(record.get("query"), str) and isinstance(record.get("response"), str)


def from_query(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    return _pairs(record, record["query"], record["response"], ["query", "response"], column)


def _pairs(record: dict[str, Any], asked: str, said: str, used: list[str], column: str | None) -> dict[str, Any]:
    history = unpacked(record.get("history"))
    before = list(spread(history)) if isinstance(history, list) and history else []
    turns = [*before, {"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return _talk(record, turns, [*used, *(["history"] if "history" in record else [])], column, "named")


def _question(record: dict[str, Any]) -> str | None:
    return next((key for key in QUESTIONS if texts_of(record.get(key)) and not isinstance(record[key], dict | int | float)), None)


def _answer_keys(record: dict[str, Any]) -> list[str]:
    keys = (*ANSWERS, "a") if "q" in record else ANSWERS  # Video-ChatGPT's; elsewhere an option
    return [key for key in keys if texts_of(record.get(key))]


def is_asked(record: dict[str, Any]) -> bool:
    asked = _question(record)
    return asked is not None and any(key != asked for key in _answer_keys(record))


def from_question(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    return asked_by(record, _question(record) or "", _answer_keys(record), column)


def asked_by(record: dict[str, Any], question: str, answers: list[str], column: str | None) -> dict[str, Any]:
    """A question and its answers. The assistant says the one that the data set calls the answer, else the most frequent."""
    found = [key for key in answers if key != question and texts_of(record.get(key))]
    if not found or not texts_of(record[question]):
        raise BadSample(f"no text in '{question if found else ' or '.join(answers[:3])}'; its keys are {keys_of(record)}")
    asked, said = texts_of(record[question]), texts_of(record[found[0]])
    if len(asked) > 1:
        if len(asked) != len(said):
            raise BadSample(f"'{question}' has {len(asked)} texts and '{found[0]}' has {len(said)}; expected as many answers as questions")
        return _talk(record, list(zip(asked, said, strict=True)), [question, found[0]], column, "named")
    words, options, used = question_with_options(record, asked[0])
    value = record[found[0]]
    texts = [str(letter_of(text, options)) for text in ([value] if isinstance(value, int) and options else said)]
    right = Counter(texts).most_common(1)[0][0]
    turns = [{"role": "user", "content": words}, {"role": "assistant", "content": right}]
    made = _talk(record, turns, [question, found[0], *used], column, "named")
    return {**made, "answers": texts_of(record["answers"]) if "answers" in found and not options else texts}


def is_boxed(record: dict[str, Any]) -> bool:
    has_box = any(isinstance(record.get(key), list) and record[key] for key in BOXES)
    return has_box and any(texts_of(record.get(key)) for key in EXPRESSIONS)


def from_box(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    words = next(key for key in EXPRESSIONS if texts_of(record.get(key)))
    key = next(key for key in BOXES if isinstance(record.get(key), list) and record[key])
    objects = boxes_of(record, key, texts_of(record[words]))
    pictures, held = pictures_of(record, column, "any")
    others = [name for name in CAPTIONS if name != words and texts_of(record.get(name))]  # of the box; captions are of the picture
    rest = without(record, [words, key], others, held)
    more = {"expressions": [text for name in others for text in texts_of(record[name])]} if others else {}
    return {**rest, **more, "objects": objects, "images": pictures}


def has_objects(record: dict[str, Any]) -> bool:
    return isinstance(record.get("objects"), list | dict) and bool(record["objects"])


def from_objects(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    pictures, held = pictures_of(record, column, "any")
    return {**without(record, held), "images": pictures}


def caption_keys(record: dict[str, Any]) -> list[str]:
    numbered = sorted(key for key in record if isinstance(key, str) and key.startswith("caption_") and key[8:].isdecimal())
    keys = [key for key in (*CAPTIONS, *numbered) if texts_of(record.get(key)) and not isinstance(record[key], bool | int | float)]
    return [key for key in keys if key in numbered] or keys[:1]


def from_captions(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    return captions_from(record, caption_keys(record), column)


def captions_from(record: dict[str, Any], keys: list[str], column: str | None) -> dict[str, Any]:
    texts = [text for key in keys for text in texts_of(whole_captions(record[key]))]
    if not texts:
        raise BadSample(f"no text in '{keys[0]}'; its keys are {keys_of(record)}")
    system = next((key for key in SYSTEM if is_present(record.get(key)) and isinstance(record[key], str)), None)
    if system is not None:
        raise BadSample(f"'{system}' stands beside a caption, which has no turns; write the record as messages")
    pictures, held = pictures_of(record, column, "any")
    return {**without(record, keys, held), "captions": texts, "images": pictures}


def without(record: dict[str, Any], *used: list[str]) -> dict[str, Any]:
    gone = {key for keys in used for key in keys}
    return {key: value for key, value in record.items() if key not in gone}


def keys_of(record: dict[str, Any]) -> str:
    """A record's keys, for a message."""
    return ", ".join(key[:40] if isinstance(key, str) and key.isprintable() else shown(key, 40) for key in list(record)[:30]) or "none"
