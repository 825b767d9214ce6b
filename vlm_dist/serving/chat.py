"""A conversation with a trained model, word by word."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_dist.data.video import Shown
from vlm_dist.models.generate import generate
from vlm_dist.models.trained import start_of
from vlm_dist.serving.answer import is_video, open_picture, open_video
from vlm_dist.serving.trained import Trained, open_trained


class Chat:
    """One conversation about pictures and videos.

    Args:
        source: a run directory, an adapter folder, a checkpoint folder or a hub id.
        base_model: where an adapter's base is now, if not where its files say.
        system: the system prompt; None: that of the training, where all samples had the same; "": none.
        options: transformers' generation settings, e.g. do_sample=True, temperature=0.7; greedy without any.

    Raises:
        ModelError: there is no such model, or its chat template takes no system prompt.
    """

    def __init__(
        self, source: str, max_new_tokens: int = 256, *, base_model: str | None = None, system: str | None = None,
        reasoning: bool = False, **options: Any,
    ):  # fmt: skip
        self.trained = open_trained(source, base_model=base_model, system=system, reasoning=reasoning)
        self.model, self.processor = self.trained.model, self.trained.processor
        self._start = None if self.has_adapter else start_of(source)
        self._base: list[Trained] = []  # shared by all conversations, opened when it is first asked
        self.max_new_tokens, self.options = max_new_tokens, options
        self.forget()

    @property
    def system(self) -> str:
        """The system prompt of this conversation; empty: none."""
        return self.trained.system

    @system.setter
    def system(self, text: str) -> None:
        self.trained = replace(self.trained, system=text)

    @property
    def has_adapter(self) -> bool:
        """Whether the base is the model without its adapter."""
        return hasattr(self.model, "disable_adapter")

    @property
    def has_base(self) -> bool:
        """Whether there is a base to compare with: that of the adapter, or what a run that trained every weight began with."""
        return self.has_adapter or self._start is not None

    def _base_model(self) -> Any:
        """What answers for the base; loaded beside the trained model where it is another one."""
        if self.has_adapter or self._start is None:
            return self.model
        if not self._base:
            self._base.append(open_trained(self._start, system=""))
        return self._base[0].model

    def another(self) -> Chat:
        """A conversation of its own with the same model."""
        other = copy.copy(self)
        other.options = dict(self.options)
        other.forget()
        return other

    def forget(self) -> None:
        """Begin a new conversation."""
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[Any] = []
        self.videos: list[Shown] = []
        self._coming: list[Any] = []

    def show(self, path: Path) -> None:
        """A picture or video that goes with the next question.

        Raises:
            DataError: it cannot be read, or the model takes no videos.
        """
        self._coming.append(self.trained.watch(open_video(path)) if is_video(path) else open_picture(path))

    def drop(self) -> None:
        """Forget what was since the last question."""
        self._coming = []

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the answer as they come. A question whose answer fails or is abandoned is not part of the conversation."""
        kinds = ["video" if isinstance(one, Shown) else "image" for one in self._coming]
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        pictures = [*self.pictures, *(one for one in self._coming if not isinstance(one, Shown))]
        videos = [*self.videos, *(one for one in self._coming if isinstance(one, Shown))]
        said = []
        for piece in self._answer(messages, pictures, videos):
            said.append(piece)
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": "".join(said).strip()}]}]
        self.pictures, self.videos, self._coming = pictures, videos, []

    def of_base(self) -> Iterator[str]:
        """What the base would have said to the last question; not part of the conversation."""
        return self._answer(self.messages[:-1], self.pictures, self.videos, base=True)

    def _answer(
        self, messages: list[dict[str, Any]], pictures: list[Any], videos: list[Shown], base: bool = False
    ) -> Iterator[str]:  # fmt: skip
        import torch
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        encoded = self.trained.encode(messages, pictures, videos)
        inputs = {**encoded.inputs, "attention_mask": torch.ones_like(encoded.inputs["input_ids"])}
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        problems: list[BaseException] = []
        abandoned = threading.Event()

        def is_abandoned(tokens: Any, *_: Any, **__: Any) -> Any:
            return torch.full((len(tokens),), abandoned.is_set(), device=tokens.device)

        def work() -> None:
            try:
                model = self._base_model() if base else self.model
                with self.model.disable_adapter() if base and self.has_adapter else nullcontext():
                    options = {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([is_abandoned]), **self.options}
                    generate(model, self.processor, inputs, self.max_new_tokens, **options)
            except BaseException as error:
                problems.append(error)
                streamer.end()

        thread = threading.Thread(target=work, name="generate")
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            abandoned.set()
            thread.join()
        if problems:
            raise problems[0]
