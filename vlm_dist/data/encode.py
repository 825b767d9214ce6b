"""Messages and pictures -> tokens, pixels and labels, through the processor's own chat template.

Shapes: L tokens in one sample. A label is the token itself where the assistant speaks (words and end-of-turn), but for pictures; else -100.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

from vlm_dist.data.bounds import beginning_beyond
from vlm_dist.data.control_tokens import ControlTokens
from vlm_dist.data.encoded import IGNORED, VIDEO_PIXELS, WEIGHT_UNIT, Encoded, lacking
from vlm_dist.data.labels import expanded, weights_of
from vlm_dist.data.messages import as_templates_take_it, joined, says_something
from vlm_dist.data.placing import Placing
from vlm_dist.data.run_tokenizer import RunTokenizer
from vlm_dist.data.samples import Sample
from vlm_dist.data.tally import Note, Tally
from vlm_dist.data.template_losses import left_out
from vlm_dist.data.thoughts import with_reasoning_apart
from vlm_dist.data.turns import Habits, Turn, assistant_turns, habits_of, prompt_before_answer
from vlm_dist.data.video import Clip, Shown
from vlm_dist.data.video_ways import VideoWay
from vlm_dist.errors import BadSample, words_of
from vlm_dist.upstream.transformers import hasten, wants_token_types

if TYPE_CHECKING:
    from vlm_dist.config import DataConfig
    from vlm_dist.config_model import VideoConfig

Tools = list[Any] | None
Videos = Sequence[Clip | Shown]


class Encoder:
    """A processor together with the rules of length and of what is learnt: `encode(sample)` for training,
    `encode_prompt(messages, images)` to generate.

    Args:
        processor: the model's.
        max_seq_length: longest sample in tokens.
        on_too_long: a longer one is refused, or its text cut at the end.
        train_on: learn from every assistant turn, or from the last one only.
        keep_tokens: control tokens that stay what they are where they stand in a text.
        split_tokens: further tokens that become plain text there.
        boxes: how objects are written, a name of conventions.py; auto: as the model does.
        video: which frames of videos are shown; None: videos are refused.
    """

    def __init__(
        self,
        processor: Any,
        max_seq_length: int,
        on_too_long: Literal["refuse", "truncate"] = "refuse",
        train_on: Literal["all", "last"] = "all",
        keep_tokens: Sequence[str] = (),
        split_tokens: Sequence[str] = (),
        boxes: str = "auto",
        video: VideoConfig | None = None,
    ):
        import torch

        self.processor = processor
        self.max_seq_length = max_seq_length
        self.on_too_long = on_too_long
        self.train_on = train_on
        self.tally = Tally()
        self.placing = Placing(processor, boxes)
        self.videos = VideoWay(processor, video)
        placeholders = [*processor.image_token_ids, *(processor.video_token_ids if self.videos.is_own else ())]
        self._picture_ids = torch.tensor([number for number in placeholders if number is not None])
        self._wants_types = wants_token_types(processor)
        self._tokens = ControlTokens(processor, self._render, keep_tokens, split_tokens)
        markup = processor.tokenizer.convert_tokens_to_ids(sorted(self._tokens.pictures))
        self._markup_ids = torch.tensor([*markup, *self._picture_ids.tolist()], dtype=torch.long)
        self._habits: tuple[str, Habits] | None = None
        self._quick = copy.copy(processor)
        self._quick.tokenizer = RunTokenizer(processor.tokenizer, processor.tokenizer.convert_ids_to_tokens(self._picture_ids.tolist()))
        hasten(self._quick)

    @classmethod
    def of(cls, processor: Any, config: DataConfig) -> Self:
        """As a configuration says."""
        return cls(
            processor, config.max_seq_length, config.on_too_long, config.train_on, config.keep_tokens, config.split_tokens, config.boxes,
            config.video,
        )  # fmt: skip

    @property
    def takes_pixels(self) -> bool:
        """Whether pictures may come as tensors: transformers' own processors on torchvision give the same numbers for them."""
        from transformers.image_processing_backends import TorchvisionBackend

        return isinstance(self.processor.image_processor, TorchvisionBackend)

    @property
    def habits(self) -> Habits:
        """What the chat template writes around an assistant's words."""
        template = str(self.processor.chat_template)
        if self._habits is None or self._habits[0] != template:
            self._habits = (template, habits_of(self._render))
        return self._habits[1]

    def encode(self, sample: Sample) -> Encoded:
        """Tokens and labels of a whole conversation.

        Raises:
            BadSample: nothing is supervised, the sample is too long (picture tokens are never cut), or template or processor refuse it.
        """
        import torch

        given = self.placing.written(sample.messages, sample.objects, sample.sizes)
        messages, notes = self._plain_text(self.written(given, sample.videos))
        if sample.objects:
            notes -= {("kept", token) for token in self.placing.convention.tokens}
        tools = self._tokens.in_values(sample.tools, notes)
        text = self._render(messages, tools=tools)
        bounded = self._bounded(text)
        notes |= left_out(messages, text, tools)
        turns = self._learnt(messages, self._turns(messages, text, tools), notes)
        inputs, picture, offsets, replacements = self._process(bounded, sample.images, sample.videos, given)
        labels = inputs["input_ids"].clone()
        counts = [float(messages[turn.number].get("weight", 1.0)) for turn in turns]
        weights = weights_of(offsets, replacements, [turn[1:] for turn in turns], counts)
        of_pictures = torch.isin(labels[0], self._markup_ids) | expanded(offsets, replacements)
        labels[0, (weights == 0) | of_pictures] = IGNORED
        if ((weights != 0) & (weights != 1)).any():
            inputs["weights"] = ((weights - 1) * WEIGHT_UNIT).round().long().where(weights != 0, 0)[None]
        encoded = self._fit(Encoded(sample.key, inputs, labels, picture, notes | sample.notes))
        if not (encoded.labels[:, 1:] != IGNORED).any():
            raise BadSample("no supervised token: the assistant says nothing, its turns count for nothing, or all of it was cut")
        return encoded

    def encode_prompt(
        self, messages: list[dict], images: list[Any], key: str = "", *, tools: Tools = None, reasoning: bool = False,
        videos: Videos = (),
    ) -> Encoded:  # fmt: skip
        """Tokens of a conversation that the assistant is to continue; no labels.

        Args:
            videos: clips, or what is shown of them already.
            reasoning: leave it to the model to think first, where the chat template begins a thought; else the prompt ends as in
                training on answers without reasoning: behind an empty one.

        Raises:
            BadSample: the chat template or the processor refuses it.
        """
        plain, notes = self._plain_text(self.written(messages, videos))
        if self.habits.takes_reasoning if reasoning else self.habits.opens_thought:
            text = prompt_before_answer(plain, partial(self._render, tools=tools), reasoning)
        else:
            text = self._render(plain, tools=tools, add_generation_prompt=True)
        inputs, picture, _, _ = self._process(text, images, videos, messages)
        return Encoded(key, inputs, inputs["input_ids"].new_full(inputs["input_ids"].shape, IGNORED), picture, notes)

    def blank(self, kinds: Sequence[str] = ("pixel_values",)) -> Encoded:
        """A blank picture, or video, or both, and no label; see `lacking`."""
        from PIL import Image

        pictures = [Image.new("RGB", (56, 56))] * ("pixel_values" in kinds)
        videos = [self.videos.blank()] * (VIDEO_PIXELS in kinds)
        content = [{"type": "image"}] * len(pictures) + [{"type": "video"}] * len(videos)
        return self.encode_prompt([{"role": "user", "content": content}], pictures, videos=videos)

    def lacking(self, samples: Sequence[Encoded]) -> Encoded | None:
        """What joins a batch that has no picture, or in a run with videos no video, so that every rank runs the vision tower as often in
        every batch: else ZeRO's collectives would differ between ranks (DeepSpeed#7170). None: nothing lacks."""
        missing = lacking(samples, self._kinds)
        return self.blank(missing) if missing else None

    @cached_property
    def _kinds(self) -> tuple[str, ...]:
        """The tensors that the vision tower is run on, once for each."""
        if not self.videos.is_own:
            return ("pixel_values",)
        return ("pixel_values", VIDEO_PIXELS) if VIDEO_PIXELS in self.blank((VIDEO_PIXELS,)).inputs else ("pixel_values",)

    def written(self, messages: list[dict], videos: Videos) -> list[dict]:
        """A conversation as the chat template gets it.

        Raises:
            BadSample: there are videos, and this model, or this run, takes none.
        """
        self.videos.check([one for one in videos if isinstance(one, Clip)])
        return self.videos.written(messages, videos)

    def count_text(self, messages: list[dict], tools: Tools = None, **options: Any) -> int:
        """Tokens of a conversation in which a picture is one placeholder.

        Raises:
            BadSample: the chat template or the tokenizer refuses it, or it is far too long.
        """
        text = self._bounded(self._render(self._plain_text(messages)[0], tools=tools, **options))
        try:
            return len(self.processor.tokenizer(text, add_special_tokens=self._adds_special_tokens(text))["input_ids"])
        except Exception as error:  # tokenizers raise whatever they like on text that is none
            raise BadSample(f"tokenizer: {words_of(error)}") from None

    def _bounded(self, text: str) -> str:
        """Of a text that is far too long only the beginning, or a refusal, before more is done with it."""
        try:
            piece = beginning_beyond(text, self.max_seq_length, self.processor.tokenizer)
        except Exception as error:  # tokenizers raise whatever they like on text that is none
            raise BadSample(f"tokenizer: {words_of(error)}") from None
        if piece is None:
            return text
        if self.on_too_long == "refuse" or piece.loses_one(text, self._tokens.pictures):
            self._refuse(f"at least {piece.tokens} tokens")
        return text[: piece.characters]

    def _adds_special_tokens(self, text: str) -> bool:
        """Unless the chat template wrote them."""
        bos = self.processor.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def _render(self, messages: list[dict], tools: Tools = None, **options: Any) -> str:
        given = [as_templates_take_it(message) for message in messages]
        if tools is not None:
            options["tools"] = self._tokens.in_values(tools, set())
        try:
            return self.processor.apply_chat_template(given, tokenize=False, **options)
        except Exception as error:  # a template raises jinja2's errors, and Python's in what it calls
            raise BadSample(f"chat template: {words_of(error)}") from None

    def _plain_text(self, messages: list[dict]) -> tuple[list[dict], set[Note]]:
        """Control tokens that a person typed (`<|im_start|>`, `<image>`) must stay text. The parts of an assistant's text become one,
        because some templates write the first only."""
        notes: set[Note] = set()
        made = []
        for given in messages:
            message = given if given["role"] == "user" else {**given, "content": joined(given["content"])}
            message = with_reasoning_apart(message) if self.habits.takes_reasoning else message
            made.append({**message, "content": [self._tokens.as_text(part, notes) for part in message["content"]]})
            if isinstance(thought := message.get("reasoning_content"), str):
                made[-1]["reasoning_content"] = self._tokens.as_text({"text": thought}, notes)["text"]
            if "tool_calls" in message:
                made[-1]["tool_calls"] = self._tokens.in_values(message["tool_calls"], notes)
        return made, notes

    def _process(self, text: str, images: list[Any], videos: Videos, messages: list[dict]) -> tuple[dict[str, Any], Any, Any, list[dict]]:
        """The processor's tensors; which tokens are picture; each token's (start, end) in the expanded text; where that was expanded."""
        import torch

        shown = [one if isinstance(one, Shown) else one.shown(self.videos.config) for one in videos]
        images = self.videos.pictures(messages, images, [one.frames for one in shown])
        try:
            batch = self._quick(
                text=[text],
                images=[images] if images else None,
                **self.videos.arguments(shown),
                return_tensors="pt",
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                return_mm_token_type_ids=self._wants_types,
                add_special_tokens=self._adds_special_tokens(text),
            )
        except Exception as error:  # what a processor does not like of a picture, it says in any way
            raise BadSample(f"processor: {words_of(error)}") from None
        inputs = dict(batch)
        offsets = inputs.pop("offset_mapping")[0]
        replacements = inputs.pop("text_replacement_offsets", [])
        inputs.pop("attention_mask")  # made anew when samples are put together
        picture = torch.isin(inputs["input_ids"][0], self._picture_ids)
        return inputs, picture, offsets, list(replacements[0]) if len(replacements) else []

    def _turns(self, messages: list[dict], text: str, tools: Tools) -> list[Turn]:
        last_only = self.train_on == "last"
        return assistant_turns(messages, text, partial(self._render, tools=tools), self.habits, self._tokens.control, last_only)

    def _learnt(self, messages: list[dict], turns: list[Turn], notes: set[Note]) -> list[Turn]:
        """The turns that count."""
        if self.train_on == "last" and sum(message["role"] == "assistant" for message in messages) > 1:
            notes.add(("turn", "all but the last (data.train_on: last)"))
        off = [turn for turn in turns if messages[turn.number].get("weight") == 0]
        notes |= {("turn", "weight 0")} if off else set()
        if sum(message["role"] == "assistant" and not says_something(message) for message in messages):
            notes.add(("turn", "empty"))
        return [turn for turn in turns if turn not in off]

    def check_length(self, tokens: int) -> None:
        """Raises:
        BadSample: so many tokens are too long, and are not to be cut.
        """
        if tokens > self.max_seq_length and self.on_too_long == "refuse":
            self._refuse(f"{tokens} tokens")

    def _refuse(self, size: str) -> NoReturn:
        remedy = "raise it, or set data.on_too_long: truncate" if self.on_too_long == "refuse" else "cutting would lose picture tokens"
        raise BadSample(f"too long: {size}, more than data.max_seq_length={self.max_seq_length}; {remedy}")

    def _fit(self, encoded: Encoded) -> Encoded:
        if encoded.length <= self.max_seq_length:
            return encoded
        limit = self.max_seq_length
        if self.on_too_long == "refuse" or encoded.picture[limit:].any():
            self._refuse(f"{encoded.length} tokens ({int(encoded.picture.sum())} of them picture)")
        return encoded.cut(limit)
