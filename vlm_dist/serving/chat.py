"""A conversation with a trained model, word by word."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from vlm_dist.data.encode import Encoder
from vlm_dist.models.generate import generate
from vlm_dist.models.trained import load_trained
from vlm_dist.serving.answer import open_picture


class Chat:
    """One conversation about pictures.

    Args:
        source: a run directory, a checkpoint folder or a hub id.
        options: transformers' generation settings, e.g. do_sample=True, temperature=0.7; greedy without any.

    Raises:
        ModelError: there is no such model.
    """

    def __init__(self, source: str, max_new_tokens: int = 256, **options: Any):
        import torch

        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.model, self.processor = load_trained(source, device)
        self.encoder = Encoder(self.processor, max_seq_length=2**31)
        self.max_new_tokens, self.options = max_new_tokens, options
        self.forget()

    @property
    def has_adapter(self) -> bool:
        """Whether there is a base to compare with."""
        return hasattr(self.model, "disable_adapter")

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
        self._coming: list[Any] = []

    def show(self, path: Path) -> None:
        """A picture that goes with the next question.

        Raises:
            DataError: it cannot be read.
        """
        self._coming.append(open_picture(path))

    def drop(self) -> None:
        """Forget the pictures shown since the last question."""
        self._coming = []

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the answer as they come. A question whose answer fails or is abandoned is not part of the conversation."""
        content = [*({"type": "image"} for _ in self._coming), {"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        pictures = [*self.pictures, *self._coming]
        said = []
        for piece in self._answer(messages, pictures):
            said.append(piece)
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": "".join(said).strip()}]}]
        self.pictures, self._coming = pictures, []

    def of_base(self) -> Iterator[str]:
        """What the model without its adapter would have said to the last question; not part of the conversation."""
        return self._answer(self.messages[:-1], self.pictures, base=True)

    def _answer(self, messages: list[dict[str, Any]], pictures: list[Any], base: bool = False) -> Iterator[str]:
        import torch
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        encoded = self.encoder.encode_prompt(messages, pictures)
        inputs = {**encoded.inputs, "attention_mask": torch.ones_like(encoded.inputs["input_ids"])}
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        problems: list[BaseException] = []
        abandoned = threading.Event()

        def is_abandoned(tokens: Any, *_: Any, **__: Any) -> Any:
            return torch.full((len(tokens),), abandoned.is_set(), device=tokens.device)

        def work() -> None:
            try:
                with self.model.disable_adapter() if base else nullcontext():
                    options = {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([is_abandoned]), **self.options}
                    generate(self.model, self.processor, inputs, self.max_new_tokens, **options)
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
