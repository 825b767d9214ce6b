"""Special tokens in a text, judged by their role.

Tokens that begin and end turns, name roles or stand for pictures must not be written by a text: a word joiner splits them. All others
(boxes, references, locations, thoughts, tool calls, ...) are what data sets teach, and stay what they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from vlm_dist.data.tally import Note
from vlm_dist.errors import BadSample, ConfigError

WORD_JOINER = "\u2060"
DATA = re.compile(r"think|reason|tool|function|object|ref|box|quad|poly|point|loc|coord|seg", re.IGNORECASE)
"""Names of tokens that are data, even where a template writes some too."""
TURN = re.compile(r"turn|utterance|im_start|im_end|eot|eom|eos|endoftext|end_of_text|header|inst\b|user|assistant|system", re.IGNORECASE)
"""Names of tokens that begin or end turns, even where this template writes others."""
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")
MEDIA = re.compile(r"image|img|video|vision|audio", re.IGNORECASE)
"""Names of tokens that stand for pictures and sounds, or around them."""
PICTURES = ("image_token", "video_token", "audio_token")  # attributes of processors and tokenizers
PROBE_SIZES = ((56, 56), (700, 450))  # (width, height): some processors write further tokens for larger pictures


class ControlTokens:
    """Which of a tokenizer's special tokens are control tokens, found by rendering and encoding a small conversation.

    Args:
        render: messages -> text, by the chat template.
        keep: tokens that stay what they are all the same.
        split: further tokens to make plain text of.

    Raises:
        ConfigError: a name is no special token of this model, or one to keep stands for pictures.
    """

    def __init__(self, processor: Any, render: Callable[..., str], keep: Sequence[str] = (), split: Sequence[str] = ()):
        tokenizer = processor.tokenizer
        known = {token for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()) if len(token) > 1}
        for setting, names in (("keep_tokens", keep), ("split_tokens", split)):
            if unknown := [token for token in names if token not in known]:
                has = ", ".join(sorted(known)[:20])
                raise ConfigError(f"data.{setting}: '{unknown[0]}' is no special token of this model; it has {has}")
        turns = _written(known, render, picture=False) | {str(getattr(tokenizer, name, None)) for name in ROLES} & known
        turns |= {token for token in known if TURN.search(token)}
        pictures = _of_pictures(known, processor, render) - turns
        shapes = {_shape(token) for token in pictures if _shape(token) != token}
        pictures |= {token for token in known if _shape(token) in shapes}
        data = {token for token in known if DATA.search(token)}
        self.pictures = frozenset(pictures - data)
        """Those that stand for pictures or around them."""
        if stands_for := sorted(set(keep) & self.pictures):
            raise ConfigError(f"data.keep_tokens: '{stands_for[0]}' stands for a picture; a text that writes it would claim one")
        self.control = frozenset(((turns | pictures) - data - set(keep)) | set(split))
        """Those that a text may not write."""
        self._first = frozenset(token[0] for token in known | self.control)
        ordered = sorted(map(re.escape, known | self.control), key=len, reverse=True)
        self._any = re.compile("|".join(ordered)) if ordered else None

    def as_text(self, part: dict[str, Any], notes: set[Note]) -> dict[str, Any]:
        """A part in whose text no control token stands; `notes` gets what was split and what was kept."""
        text = part.get("text")
        if not isinstance(text, str) or self._any is None or not any(char in self._first for char in set(text)):
            return part

        def plain(found: re.Match[str]) -> str:
            token = found[0]
            notes.add(("split" if token in self.control else "kept", _shape(token)))
            return token[0] + WORD_JOINER + token[1:] if token in self.control else token

        return {**part, "text": self._any.sub(plain, text)}

    def in_values(self, value: Any, notes: set[Note]) -> Any:
        """The same of every text in tools or tool calls.

        Raises:
            BadSample: they are nested without end.
        """
        try:
            return self._in_values(value, notes)
        except RecursionError:
            raise BadSample("json: tools or tool calls are nested too deeply") from None

    def _in_values(self, value: Any, notes: set[Note]) -> Any:
        if isinstance(value, dict):
            return {key: self._in_values(inner, notes) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._in_values(inner, notes) for inner in value]
        return self.as_text({"text": value}, notes)["text"] if isinstance(value, str) else value


def _shape(token: str) -> str:
    """A token with its numbers left out: <row_1_col_2> and <loc0042> are one of many."""
    return re.sub(r"\d+", "#", token) if re.search(r"[^\d]\d", token) else token


def _written(known: set[str], render: Callable[..., str], *, picture: bool) -> set[str]:
    """Tokens that the template writes by itself."""
    content = [{"type": "text", "text": "a"}]
    system, answer = {"role": "system", "content": content}, {"role": "assistant", "content": content}
    user = {"role": "user", "content": [*([{"type": "image"}] if picture else []), *content]}
    texts = []
    for messages in ([user, answer, user, answer], [system, user, answer]):
        try:
            texts += [render(messages), render(messages[:-1], add_generation_prompt=True)]
        except BadSample:  # it takes no system turn
            continue
    return {token for token in known if any(token in text for text in texts)}


def _of_pictures(known: set[str], processor: Any, render: Callable[..., str]) -> set[str]:
    from PIL import Image

    named = {str(getattr(owner, name, None)) for owner in (processor, processor.tokenizer) for name in PICTURES}
    found = _written(known, render, picture=True) | named & known | {token for token in known if MEDIA.search(token)}
    content = [{"type": "image"}, {"type": "text", "text": "a"}]
    for size in PROBE_SIZES:
        try:
            text = render([{"role": "user", "content": content}])
            ids = processor(text=[text], images=[[Image.new("RGB", size)]])["input_ids"][0]
        except Exception:  # whatever a processor dislikes; `load_processor` has seen it take a picture
            continue
        found |= set(processor.tokenizer.convert_ids_to_tokens([int(number) for number in ids])) & known
    return found
