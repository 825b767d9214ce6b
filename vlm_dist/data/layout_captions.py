"""What stands in the place of a caption and is none."""

from __future__ import annotations

import re
from typing import Any

from vlm_dist.data.layout_values import shown
from vlm_dist.errors import BadSample

RENDERED = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[/INST\]"
    r"|\A\s*(?:<image>\s*)?(?:### ?)?(?:USER|Human|User|Instruction):.*?\s(?:### ?)?(?:ASSISTANT|Assistant|GPT|Response):",
    re.DOTALL,
)
NUMBER = r"-?\d*\.?\d+(?:[eE]-?\d+)?"
YOLO = re.compile(rf"\d+(?:[ \t]+{NUMBER}){{4,}}(?:\s*\n\d+(?:[ \t]+{NUMBER}){{4,}})*")


def check_caption(text: str) -> None:
    """See that what stands in the place of a caption is one.

    Raises:
        BadSample: it is a conversation that a chat template wrote, or numbers of YOLO's boxes.
    """
    if RENDERED.search(text):
        raise BadSample(f"the text {shown(text, 60)} is a conversation that a chat template wrote, no caption; give its turns, as messages")
    if YOLO.fullmatch(text.strip()):
        raise BadSample(f"the text {shown(text, 60)} is YOLO's boxes, no caption; make COCO's JSON of them")


def refuse_interleaved(record: dict[str, Any], keys: list[str]) -> None:
    """OBELICS's documents: `texts` and `images` by turns, None where the other stands."""
    texts, images = record.get("texts"), record.get("images")
    if keys == ["texts"] and isinstance(texts, list) and isinstance(images, list) and None in texts and None in images:
        raise BadSample("a document of texts and pictures by turns, without a question, is not read; write its turns as messages")
