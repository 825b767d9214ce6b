"""The layouts of records: how each is recognised, and what it becomes. `layouts.py` has the table of them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from vlm_dist.data.layout_boxes import BOX_KEYS, boxes_of
from vlm_dist.data.layout_captions import check_caption, refuse_interleaved
from vlm_dist.data.layout_keys import ANSWERS, CAPTIONS, EXPRESSIONS, PAIR_KEYS, QUESTIONS, RIVALS, SYSTEM, TURN_KEYS
from vlm_dist.data.layout_lists import looks_like_turns, spread, unpacked
from vlm_dist.data.layout_names import only_one
from vlm_dist.data.layout_options import option_said, question_with_options
from vlm_dist.data.layout_turns import Turns
from vlm_dist.data.layout_values import is_present, keys_of, named_sources, parsed, pictures_of, shown, texts_of
from vlm_dist.data.layout_videos import spans_of_parts, whole_captions
from vlm_dist.errors import BadSample


def is_messages(record: dict[str, Any]) -> bool:
    return isinstance(record.get("messages"), list) or _are_turns(record.get("messages"))  # whatever is wrong in a list, it is meant


def is_conversation(record: dict[str, Any]) -> bool:
    return isinstance(record.get("conversations"), list) or _turns_key(record) is not None


def _turns_key(record: dict[str, Any]) -> str | None:
    named = next((key for key in TURN_KEYS[:2] if isinstance(record.get(key), list)), None)
    named = named or next((key for key in TURN_KEYS if _are_turns(record.get(key))), None)
    return named or next((key for key in PAIR_KEYS if looks_like_turns(record.get(key))), None)


def _are_turns(value: Any) -> bool:
    if value is None:
        return False
    value = unpacked(value)
    is_alternating = isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)
    return is_alternating or looks_like_turns(value) or _are_pairs(value)


def _are_pairs(value: Any) -> bool:
    """[[question, answer], ...]"""
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(one, list | tuple) and len(one) == 2 and all(isinstance(text, str) for text in one) for one in value)


def from_turns(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    key = _turns_key(record) or TURN_KEYS[0]
    return _talk(record, unpacked(record[key]), [key], column)


def _talk(record: dict[str, Any], turns: Any, used: list[str], column: str | None, files: str | None = None) -> dict[str, Any]:
    """Turns, with what stands beside them: system, pictures."""
    turns, (pictures, held) = list(spread(turns)), pictures_of(record, column, files)
    names = next((list(found) for key in held if (found := named_sources(record.get(key)))), [])
    system_keys = [key for key in SYSTEM if is_present(record.get(key))]
    made = Turns(turns, pictures, names)
    for key in reversed(system_keys):
        if not isinstance(record[key], str):
            raise BadSample(f"'{key}' is {shown(record[key])}; expected the text of the system prompt")
        _with_system(made.turns, record[key])
    rest = without(record, used, held, [key for key in SYSTEM if not is_present(record.get(key))], system_keys)
    return {**rest, "messages": made.turns, "images": made.images, "videos": made.videos, **spans_of_parts(made.spans, record)}


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


def is_prompt(record: dict[str, Any]) -> bool:
    return _prompt_keys(record) is not None


def _prompt_keys(record: dict[str, Any]) -> tuple[str, str] | None:
    """The keys of what is asked and said, where one of them holds turns, or they are TRL's `prompt` and `completion`."""
    if all(isinstance(record.get(key), str | list) and record[key] for key in ("prompt", "completion")):
        return "prompt", "completion"
    asked = next((key for key in QUESTIONS if key not in PAIR_KEYS and looks_like_turns(record.get(key))), None)
    if asked is None:
        return None
    said = next((key for key in ANSWERS if key != asked and (looks_like_turns(record.get(key)) or texts_of(record.get(key)))), None)
    return (asked, said) if said else None


def from_prompt(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    asked, said = _prompt_keys(record) or ("prompt", "completion")
    turns: list[dict[str, Any]] = []
    texts = [] if said == "completion" or looks_like_turns(record[said]) else texts_of(record[said])
    for key, role in ((asked, "user"), (said, "assistant")):
        value = Counter(texts).most_common(1)[0][0] if key == said and texts else record[key]
        turns += spread(unpacked(value)) if looks_like_turns(value) else [{"role": role, "content": value}]
    made = _talk(record, turns, [asked, said], column)
    return {**made, "answers": texts} if texts and "answers" not in made else made


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
    asked = texts_of(record[question])
    if len(asked) > 1:
        return _talk(record, _pairs_of(record, question, found[0]), [question, found[0]], column, "named")
    words, options, used = question_with_options(record, asked[0])
    value = record[found[0]]
    texts = option_said(value, record, options)
    if options and isinstance(value, list | tuple) and len(set(texts)) > 1:
        raise BadSample(
            f"'{found[0]}' names several options ({', '.join(texts[:6])}): all of them may be right together, or each; write one text"
        )
    right = Counter(texts).most_common(1)[0][0]
    turns = [{"role": "user", "content": words}, {"role": "assistant", "content": right}]
    made = _talk(record, turns, [question, found[0], *used], column, "named")
    return {**made, "answers": texts_of(record["answers"]) if "answers" in found and not options else texts}


def _pairs_of(record: dict[str, Any], question: str, answer: str) -> list[tuple[str, str]]:
    """Several questions, each with the answer in the same place, of several the most frequent; places where both are empty are none."""
    asked, said = (_in_places(record[key]) for key in (question, answer))
    if len(asked) != len(said) or any(bool(one) != bool(other) or len(one) > 1 for one, other in zip(asked, said, strict=True)):
        counts = [sum(map(len, texts)) for texts in (asked, said)]
        raise BadSample(
            f"'{question}' has {counts[0]} texts and '{answer}' has {counts[1]}; expected one answer in the place of each question"
        )
    return [(one[0], Counter(other).most_common(1)[0][0]) for one, other in zip(asked, said, strict=True) if one]


def _in_places(value: Any) -> list[list[str]]:
    """The texts of each thing in a list."""
    return [texts_of(one) for one in value] if isinstance(value, list | tuple) else [[one] for one in texts_of(value)]


def is_boxed(record: dict[str, Any]) -> bool:
    has_box = any(isinstance(record.get(key), list) and record[key] for key in BOX_KEYS)
    return has_box and any(texts_of(record.get(key)) for key in EXPRESSIONS)


def has_one_box(record: dict[str, Any]) -> bool:
    """Whether a record marks one place in its picture: no words that were read in it."""
    value = next((record[key] for key in BOX_KEYS if isinstance(record.get(key), list) and record[key]), [])
    return len(value) == 4 and all(type(side) in (int, float) for side in value)


def from_box(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    words = next(key for key in EXPRESSIONS if texts_of(record.get(key)))
    key = next(key for key in BOX_KEYS if isinstance(record.get(key), list) and record[key])
    marked = boxes_of(record, key, texts_of(record[words]))
    pictures, held = pictures_of(record, column, "any")
    others = [name for name in CAPTIONS if name != words and texts_of(record.get(name))]  # of the box; captions are of the picture
    rest = without(record, [words, key], others, held)
    more = {"expressions": [text for name in others for text in texts_of(record[name])]} if others else {}
    return {**rest, **more, **marked, "images": pictures}


def has_objects(record: dict[str, Any]) -> bool:
    return isinstance(record.get("objects"), list | dict) and bool(record["objects"])


def from_objects(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    pictures, held = pictures_of(record, column, "any")
    return {**without(record, held), "images": pictures}


def has_ground_truth(record: dict[str, Any]) -> bool:
    return _ground_truth(record) is not None


def _ground_truth(record: dict[str, Any]) -> list[Any] | None:
    """What Donut's `ground_truth` is to be read as: one thing, or any of several; None: there is none."""
    value = record.get("ground_truth")
    value = parsed(value) if isinstance(value, str) and value.lstrip()[:1] == "{" else value
    if not isinstance(value, dict):
        return None
    found = value["gt_parses"] if isinstance(value.get("gt_parses"), list) else [value["gt_parse"]] if "gt_parse" in value else None
    return found or None


def from_ground_truth(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    """Questions and answers become turns; everything else what is read in the picture, as JSON, or as it is where it is text alone."""
    found = _ground_truth(record) or []
    if looks_like_turns(found):
        return _talk(record, found, ["ground_truth"], column, "named")
    words = [one.get("text_sequence") if isinstance(one, dict) and len(one) == 1 else one for one in found]
    texts = [word if isinstance(word, str) else json.dumps(one, ensure_ascii=False) for word, one in zip(words, found, strict=True)]
    return captions_from({**record, "ground_truth": texts}, ["ground_truth"], column)


def refuse_rivals(record: dict[str, Any], layout: str) -> None:
    """Where two keys of a record could be its question, its answer or its caption.

    Raises:
        BadSample: names both, and what decides.
    """
    if layout in ("question and answer", "query and response", "Alpaca", "prompt and completion"):
        asked = [key for key in RIVALS["question"] if not looks_like_turns(record.get(key))]
        only_one(record, "question", asked)
        only_one(record, "answer")
    elif layout == "captions" and not any(texts_of(record.get(key)) for key in ("captions", "caption", "sentences", "texts")):
        only_one(record, "caption")


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
    for text in texts:
        check_caption(text)
    refuse_interleaved(record, keys)
    system = next((key for key in SYSTEM if is_present(record.get(key)) and isinstance(record[key], str)), None)
    if system is not None:
        raise BadSample(f"'{system}' stands beside a caption, which has no turns; write the record as messages")
    pictures, held = pictures_of(record, column, "any")
    return {**without(record, keys, held), "captions": texts, "images": pictures}


def without(record: dict[str, Any], *used: list[str]) -> dict[str, Any]:
    gone = {key for keys in used for key in keys}
    return {key: value for key, value in record.items() if key not in gone}
