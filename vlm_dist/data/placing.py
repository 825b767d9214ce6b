"""Objects put into a conversation's text, as its model writes them, and read out of an answer.

Placeholders stand where they go (ms-swift's names): `<ref-object>` for a label, `<bbox>`, `<point>` and `<polygon>` for a place, each for
the next object; `<objects>` for all of them, as the model lists what it has detected. A record that has objects and no text asks for them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from vlm_dist.data.boxes import Marked, are_objects, listed
from vlm_dist.data.conventions import Convention, convention_of
from vlm_dist.data.frames import Frame, Frames
from vlm_dist.data.pictures import Size
from vlm_dist.errors import BadSample

Messages = list[dict[str, Any]]
LABEL, LIST, PLACES = "<ref-object>", "<objects>", ("<bbox>", "<point>", "<polygon>")
PLACEHOLDER = re.compile("|".join((LABEL, LIST, *PLACES)))
ASKS_BOX = ("Where is {}?", "Locate {}.", "Give the box of {}.")
ASKS_POINT = ("Point to {}.", "Give a point on {}.")
ASKS_ALL = ("Detect all of these: {}.", "Give the place of each of these: {}.")


def asked_for(record: dict[str, Any], key: str, draw: str | None) -> Messages | None:
    """A question about a record's objects, and the answer; None: it has none.

    Args:
        draw: what decides how the question is put, together with the sample's key; None: the first way.
    """
    objects = record.get("objects")
    if not are_objects(objects):
        return None
    several = listed(objects)
    labels = [one.get("label") for one in several]
    named = list(dict.fromkeys(label.strip() for label in labels if isinstance(label, str) and label.strip()))
    if len(several) > 1:
        forms, subject = ASKS_ALL, ", ".join(named) or "everything"
    else:
        forms, subject = ASKS_POINT if "point" in several[0] else ASKS_BOX, LABEL if named else "the object"
    form = forms[0 if draw is None else random.Random(f"{draw}/{key}").randrange(len(forms))]
    return [
        {"role": "user", "content": [{"type": "text", "text": form.format(subject)}]},
        {"role": "assistant", "content": [{"type": "text", "text": LIST}]},
    ]


def check_placeholders(messages: Messages, objects: Sequence[Marked]) -> None:
    """See that they agree in number.

    Raises:
        BadSample: they do not, or a label is asked of an object that has none.
    """
    found = placeholders_of(messages)
    places, labels = sum(one in PLACES for one in found), found.count(LABEL)
    if places not in (0, len(objects)):
        raise BadSample(f"the text has {places} of {', '.join(PLACES)}; 'objects' has {len(objects)}")
    named = _names(objects, labels)
    if labels and len(named) != labels:
        raise BadSample(f"the text has {labels} of {LABEL}; 'objects' has {len(objects)}, with {len(set(_labels(objects)))} labels")
    if labels and not all(one.label for one in named):
        raise BadSample(f"the text has {LABEL}, and an object has no label")


def placeholders_of(messages: Messages) -> list[str]:
    """All of them, in order."""
    return [one for message in messages for one in _placeholders(message)]


def objects_answered(messages: Messages, objects: Sequence[Marked]) -> list[Marked]:
    """Those that the last answer is to give: what its placeholders stand for; all of them where no text has any.

    Args:
        messages: as `parse_sample` gives them, not yet written.
    """
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    before = sum(one in PLACES for one in placeholders_of(messages[:last]))
    answer = _placeholders(messages[last])
    if LIST in answer or not placeholders_of(messages):
        return list(objects)
    return list(objects[before : before + sum(one in PLACES for one in answer)])


class Placing:
    """Of one processor. Made at the first need: most data sets have no objects.

    Args:
        name: of a convention; auto: the model's own.
    """

    def __init__(self, processor: Any, name: str = "auto"):
        self._processor, self._name = processor, name
        self._made: tuple[Convention, Frames] | None = None

    @property
    def convention(self) -> Convention:
        return self._both[0]

    def frames(self, sizes: Sequence[Size]) -> list[Frame]:
        """What is shown of pictures of these (width, height)."""
        return [self._both[1].of(size, len(sizes) > 1) for size in sizes]

    def written(self, messages: Messages, objects: Sequence[Marked], sizes: Sequence[Size]) -> Messages:
        """The conversation with objects in the place of placeholders.

        Args:
            sizes: (width, height) of each picture, upright.

        Raises:
            BadSample: an object lies outside of what the processor shows of its picture.
        """
        if not objects:
            return messages
        convention, frames = self.convention, self.frames(sizes)
        labels = sum(_placeholders(message).count(LABEL) for message in messages)
        names, places = iter(_names(objects, labels)), iter(objects)

        def text(found: re.Match[str]) -> str:
            if found[0] == LABEL:
                return convention.name_of(next(names))
            if found[0] == LIST:
                return convention.list_of(objects, [frames[one.image] for one in objects])
            one = next(places)
            kind = found[0][1:-1]
            if (kind == "polygon" and one.kind != "polygon") or (kind == "bbox" and one.kind == "point"):
                raise BadSample(f"{found[0]} stands for a {one.kind}")
            return convention.place(one, kind, frames[one.image])

        def part(given: dict[str, Any]) -> dict[str, Any]:
            return {**given, "text": PLACEHOLDER.sub(text, given["text"])} if "text" in given else given

        return [{**message, "content": [part(one) for one in message["content"]]} for message in messages]

    def read(self, answer: str, sizes: Sequence[Size], images: Sequence[int] = (0,)) -> list[Marked]:
        """What an answer marks, in pixels of the pictures of these (width, height), upright.

        Args:
            images: the picture that each object lies in, in order; the last also for those that follow.
        """
        frames = self.frames(sizes)
        found = self.convention.read(answer, [frames[image] for image in images])
        return [one._replace(image=images[min(number, len(images) - 1)]) for number, one in enumerate(found)]

    def as_generated(self, text: str) -> str:
        """A text without the special tokens of the convention, as `generate` gives answers."""
        special = set(self._processor.tokenizer.all_special_tokens)
        for token in special.intersection(self.convention.tokens):
            text = text.replace(token, "")
        return text

    @property
    def _both(self) -> tuple[Convention, Frames]:
        if self._made is None:
            convention = convention_of(self._processor, self._name)
            self._made = (convention, Frames(self._processor.image_processor, absolute=convention.scale is None))
        return self._made


def size_of(image: Any) -> Size:
    """(width, height) of Pillow's picture, or of a tensor [3, H, W]."""
    return (int(image.shape[-1]), int(image.shape[-2])) if hasattr(image, "shape") else image.size


def _placeholders(message: dict[str, Any]) -> list[str]:
    return [one for part in message["content"] if "<" in part.get("text", "") for one in PLACEHOLDER.findall(part["text"])]


def _labels(objects: Sequence[Marked]) -> list[str]:
    return list(dict.fromkeys(one.label for one in objects))


def _names(objects: Sequence[Marked], count: int) -> list[Marked]:
    """What so many `<ref-object>` stand for: each object, or the first of each label."""
    if count == len(objects):
        return list(objects)
    return [next(one for one in objects if one.label == label) for label in _labels(objects)]
