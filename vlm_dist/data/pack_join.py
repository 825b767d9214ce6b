"""Records that one file alone does not tell: answers in a file of their own, one split of several, pictures that a number names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_dist.data.layout_keys import ANSWERS
from vlm_dist.data.layout_values import NAMES_PICTURE, keys_of, shown, texts_of
from vlm_dist.errors import BadSample, DataError

READ = ("messages", "captions", "caption", "answers", "objects", "images", "videos")
LONGEST_NAME = 1024
IDS = ("question_id", "id", "qid", "uid")
COCO = ("train2014", "val2014", "test2014", "test2015", "train2017", "val2017", "test2017")


def joined(questions: Sequence[Any], annotations: Sequence[Any], source: str, other: str) -> list[Any]:
    """VQA's two files -> a record a question, with its answers; what has no partner is a BadSample.

    Args:
        source, other: names of the two, for messages.

    Raises:
        DataError: they have no key in common that numbers the questions.
    """
    firsts = [next((record for record in part if isinstance(record, dict)), {}) for part in (questions, annotations)]
    key = next((key for key in IDS if all(key in record for record in firsts)), None)
    if key is None:
        raise DataError(
            f"data pack: '{source}' (keys {keys_of(firsts[0])}) and '{other}' (keys {keys_of(firsts[1])}) have no number of the question "
            f"in common; expected {', '.join(IDS)}"
        )
    left = {str(record[key]): record for record in annotations if isinstance(record, dict) and key in record}
    made: list[Any] = [record for record in annotations if isinstance(record, BadSample)]
    for record in questions:
        number = str(record.get(key)) if isinstance(record, dict) else ""
        partner = left.pop(number, None)
        if partner is not None:
            made.append({**partner, **record})
        else:
            made.append(record if isinstance(record, BadSample) else _alone(key, number, source))
    return made + [_alone(key, number, other) for number in left]


def _alone(key: str, number: str, file: str) -> BadSample:
    return BadSample(
        f"{key} {number[:60]} stands in '{Path(file).name}' alone; expected a question in one of the files, its answers in the other"
    )


def refuse_half(records: Sequence[Any], source: str) -> None:
    """Where questions and answers stand in two files, one of them is not enough.

    Raises:
        DataError: the first record is a question without an answer, or the reverse.
    """
    first = records[0] if len(records) and isinstance(records[0], dict) else {}
    if "question_id" not in first or any(key in first for key in ("messages", "conversations", "caption", "captions")):
        return
    has_question, has_answer = bool(texts_of(first.get("question"))), any(texts_of(first.get(key)) for key in ANSWERS)
    if has_question != has_answer and ("question" not in first or "image_id" in first):
        lacks = "answers" if has_question else "questions"
        raise DataError(
            f"data pack: '{source}' has no {lacks} (keys {keys_of(first)}); if they stand in a file of their own, give both: "
            "vlm-dist data pack QUESTIONS.json OUT --annotations ANNOTATIONS.json --images FOLDER"
        )


def of_split(records: Sequence[Any], split: str, source: str) -> list[int]:
    """Numbers of the records whose key `split` is one of those named, as in Karpathy's and A-OKVQA's files; also of those that cannot be
    read.

    Args:
        split: "train", or several: "train,restval".

    Raises:
        DataError: there is none.
    """
    values = [record.get("split") if isinstance(record, dict) else record for record in records]
    return numbers_of_split(values, split, source)


def numbers_of_split(values: Sequence[Any], split: str, source: str) -> list[int]:
    """The same, of the column alone."""
    found, wanted = Counter(value for value in values if isinstance(value, str)), [name.strip() for name in split.split(",")]
    if not found:
        raise DataError(f"data pack: --split {split}: '{source}' has no splits, neither by name nor in a key 'split'; leave it away")
    if missing := [name for name in wanted if name not in found]:
        names = ", ".join(f"{name} ({count:,})" for name, count in found.most_common(20))
        raise DataError(f"data pack: '{source}' has no split '{missing[0]}'; it has {names}")
    return [number for number, value in enumerate(values) if value in wanted or isinstance(value, BadSample)]


def picture_by_number(record: dict[str, Any], base: Path) -> list[str]:
    """The picture that a record names by its number alone, `image_id`, as VQA, OK-VQA, A-OKVQA and COCO's results do; empty: it names none.

    Raises:
        BadSample: it does not lie below `base`.
    """
    number = record.get("image_id")
    is_name = isinstance(number, str) and re.fullmatch(r"[\w-]{1,100}", number) is not None  # GQA's, TextVQA's
    if isinstance(number, bool) or not (isinstance(number, int) or is_name):
        return []
    is_number = isinstance(number, int) or (number.isdecimal() and len(number) < 13)
    names = list(_names(int(number), record.get("split"))) if is_number else [f"{number}.{kind}" for kind in ("jpg", "png", "jpeg")]
    found = next((name for name in names if (base / name).is_file()), None)
    if found is None:
        other = "another of COCO's names" if is_number else names[1]
        raise BadSample(
            f"picture number {number} (image_id) does not lie below '{base}' as {names[0]} or {other}; "
            "say where the pictures lie: --images FOLDER"
        )
    return [found]


def refuse_unread_picture(record: dict[str, Any]) -> None:
    """See that no key names a picture where none was read.

    Raises:
        BadSample: one does.
    """
    named = [key for key, value in record.items() if key not in READ and _is_picture(value)]
    if named:
        found, keys = f"'{named[0]}' names one ({shown(record[named[0]], 60)})", ",".join(named)
        raise BadSample(f"no picture is read, and {found}; `data pack --image {keys}` reads it")


def _is_picture(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, str) and len(value) < LONGEST_NAME and "\n" not in value and NAMES_PICTURE.search(value) is not None


def _names(number: int, split: Any) -> Iterator[str]:
    """Names that COCO's pictures have, most likely first."""
    kinds = sorted(COCO, key=lambda kind: not (isinstance(split, str) and split and kind.startswith(split)))
    plain = f"{number:012d}.jpg"
    for kind in kinds:
        for name in (plain,) if "2017" in kind else (f"COCO_{kind}_{plain}", plain):
            yield from (name, f"{kind}/{name}")
    yield from (f"{number}.jpg", f"{number}.png")
