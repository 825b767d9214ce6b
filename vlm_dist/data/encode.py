"""Messages and pictures -> tokens, pixels and labels, through the processor's own chat template.

Shapes: L tokens in one sample. A label is the token itself where the assistant speaks (its text and its end-of-turn), else -100.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vlm_dist.data.samples import Sample
from vlm_dist.errors import BadSample

IGNORED = -100  # the label of tokens that are not supervised, as in torch.nn.functional.cross_entropy
RAISE_OR_CUT = "raise it, or set data.on_too_long: truncate"
WORD_JOINER = "\u2060"


@dataclass
class Encoded:
    """One sample as the model takes it."""

    key: str
    inputs: dict[str, Any]
    """Tensors: `input_ids` [1, L], other per-token tensors [1, L], and what the vision tower needs (pixel_values, ...)."""
    labels: Any
    """[1, L] int64."""
    picture: Any
    """[L] bool: tokens that stand for a piece of a picture."""

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]


class Encoder:
    """A processor together with the rules of length: `encode(sample)` for training, `encode_prompt(messages, images)` to generate."""

    def __init__(self, processor: Any, max_seq_length: int, on_too_long: Literal["refuse", "truncate"] = "refuse"):
        import torch

        self.processor = processor
        self.max_seq_length = max_seq_length
        self.on_too_long = on_too_long
        self._picture_ids = torch.tensor([number for number in processor.image_token_ids if number is not None])
        self._wants_types = "mm_token_type_ids" in processor.model_input_names
        self._control_tokens = [token for token in processor.tokenizer.all_special_tokens if len(token) > 1]

    @property
    def takes_pixels(self) -> bool:
        """Whether pictures may come as tensors: transformers' own processors on torchvision give the same numbers for them."""
        from transformers.image_processing_backends import TorchvisionBackend

        return isinstance(self.processor.image_processor, TorchvisionBackend)

    def encode(self, sample: Sample) -> Encoded:
        """Tokens and labels of a whole conversation.

        Raises:
            BadSample: nothing is supervised, or the sample is too long (picture tokens are never cut).
        """
        messages = self._plain_text(sample.messages)
        text = self._render(messages)
        inputs, picture, offsets, replacements = self._process(text, sample.images)
        labels = inputs["input_ids"].clone()
        labels[0, ~_supervised(offsets, replacements, self._assistant_spans(messages, text))] = IGNORED
        encoded = self._fit(Encoded(sample.key, inputs, labels, picture))
        if not (encoded.labels[:, 1:] != IGNORED).any():
            raise BadSample("no supervised token: the assistant says nothing, or all of it was cut")
        return encoded

    def encode_prompt(self, messages: list[dict], images: list[Any], key: str = "") -> Encoded:
        """Tokens of a conversation that the assistant is to continue; no labels."""
        text = self._render(self._plain_text(messages), add_generation_prompt=True)
        inputs, picture, _, _ = self._process(text, images)
        return Encoded(key, inputs, inputs["input_ids"].new_full(inputs["input_ids"].shape, IGNORED), picture)

    def count_text(self, messages: list[dict], **options: Any) -> int:
        """Tokens of a conversation in which a picture is one placeholder."""
        text = self._render(self._plain_text(messages), **options)
        return len(self.processor.tokenizer(text, add_special_tokens=self._adds_special_tokens(text))["input_ids"])

    def _adds_special_tokens(self, text: str) -> bool:
        """Unless the chat template wrote them."""
        bos = self.processor.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def _render(self, messages: list[dict], **options: Any) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, **options)

    def _plain_text(self, messages: list[dict]) -> list[dict]:
        """Control tokens that a person typed (`<|im_start|>`, `<image>`) must stay text: a word joiner splits them."""

        def plain(part: dict) -> dict:
            text = part.get("text", "")
            for token in self._control_tokens:
                text = text.replace(token, token[0] + WORD_JOINER + token[1:])
            return {**part, "text": text} if "text" in part else part

        return [{**message, "content": [plain(part) for part in message["content"]]} for message in messages]

    def _process(self, text: str, images: list[Any]) -> tuple[dict[str, Any], Any, Any, list[dict]]:
        """The processor's tensors; which tokens are picture; each token's (start, end) in the expanded text; where that was expanded."""
        import torch

        batch = self.processor(
            text=[text],
            images=[images] if images else None,
            return_tensors="pt",
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            return_mm_token_type_ids=self._wants_types,
            add_special_tokens=self._adds_special_tokens(text),
        )
        inputs = dict(batch)
        offsets = inputs.pop("offset_mapping")[0]
        replacements = inputs.pop("text_replacement_offsets", [])
        inputs.pop("attention_mask")  # made anew when samples are put together
        picture = torch.isin(inputs["input_ids"][0], self._picture_ids)
        return inputs, picture, offsets, list(replacements[0]) if len(replacements) else []

    def _assistant_spans(self, messages: list[dict], text: str) -> list[tuple[int, int]]:
        """(start, end) in the rendered text of each assistant turn, its end-of-turn included, what follows that excluded.

        Found by rendering the conversation up to each turn: no generation marker in the template is needed.
        """
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], add_generation_prompt=True)
            after = self._render(messages[: number + 1]) if number + 1 < len(messages) else text
            if not (after.startswith(before) and text.startswith(after)):
                raise BadSample(f"the chat template rewrites earlier turns, so turn {number} cannot be located; use single-turn samples")
            spans.append((len(before), len(after.rstrip())))
        return spans

    def check_length(self, tokens: int) -> None:
        """Raises:
        BadSample: so many tokens are too long, and are not to be cut.
        """
        if tokens > self.max_seq_length and self.on_too_long == "refuse":
            raise BadSample(f"too long: {tokens} tokens, more than data.max_seq_length={self.max_seq_length}; {RAISE_OR_CUT}")

    def _fit(self, encoded: Encoded) -> Encoded:
        if encoded.length <= self.max_seq_length:
            return encoded
        limit, num_picture = self.max_seq_length, int(encoded.picture.sum())
        size = f"{encoded.length} tokens ({num_picture} of them picture), more than data.max_seq_length={limit}"
        if self.on_too_long == "refuse":
            raise BadSample(f"too long: {size}; {RAISE_OR_CUT}")
        if encoded.picture[limit:].any():
            raise BadSample(f"too long: {size}; cutting would lose picture tokens")
        length = encoded.length
        cut = {name: tensor[:, :limit] if is_per_token(tensor, length) else tensor for name, tensor in encoded.inputs.items()}
        return Encoded(encoded.key, cut, encoded.labels[:, :limit], encoded.picture[:limit])


def is_per_token(tensor: Any, length: int) -> bool:
    """Whether a processor's tensor of one sample has values a token: [1, L], or [1, L, pictures, tiles] (a cross-attention mask)."""
    return tensor.ndim in (2, 4) and tuple(tensor.shape[:2]) == (1, length) and not tensor.is_floating_point()


def _supervised(offsets: Any, replacements: list[dict], spans: list[tuple[int, int]]) -> Any:
    """Mask [L]: tokens that lie in a span, whose ends are moved past the pictures expanded before them."""
    import torch

    mask = torch.zeros(len(offsets), dtype=torch.bool)
    starts, ends = offsets[:, 0], offsets[:, 1]
    for start, end in spans:
        start, end = _after_expansion(start, replacements), _after_expansion(end, replacements)
        mask |= (starts < end) & (ends > start)
    return mask


def _after_expansion(position: int, replacements: list[dict]) -> int:
    gained = [r["new_span"][1] - r["span"][1] for r in replacements if r["span"][1] <= position]
    return position + (gained[-1] if gained else 0)
