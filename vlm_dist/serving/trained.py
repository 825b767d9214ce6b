"""A trained model opened to be asked: on its device, with the system prompt that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_dist.cards import device_here
from vlm_dist.data.encode import Encoded, Encoder
from vlm_dist.data.video import Clip, Shown
from vlm_dist.errors import BadSample, DataError, ModelError
from vlm_dist.models.adapters import check_there
from vlm_dist.models.trained import load_trained, system_prompt_of, video_config_of


@dataclass
class Trained:
    model: Any
    encoder: Encoder
    system: str
    """What every conversation begins with; empty: nothing."""
    reasoning: bool = False
    """Leave it to the model to think first, where its chat template begins a thought."""

    @property
    def processor(self) -> Any:
        return self.encoder.processor

    def watch(self, clip: Clip) -> Shown:
        """The frames of a video that this model is shown.

        Raises:
            DataError: it takes no videos, or this one is damaged.
        """
        try:
            self.encoder.videos.check([clip])
            return clip.shown(self.encoder.videos.config)
        except BadSample as reason:
            raise DataError(f"this model cannot be shown that: {reason}") from None

    def encode(self, messages: list[dict[str, Any]], pictures: list[Any], videos: Sequence[Shown] = ()) -> Encoded:
        """A conversation, the system prompt before it, that the assistant is to continue.

        Raises:
            DataError: the model's chat template or processor refuses it.
        """
        try:
            return self.encoder.encode_prompt([*_system_message(self.system), *messages], pictures, reasoning=self.reasoning, videos=videos)
        except BadSample as reason:
            raise DataError(f"this model cannot be asked that: {reason}") from None


def open_trained(
    source: str, *, base: bool = False, base_model: str | None = None, system: str | None = None, reasoning: bool = False
) -> Trained:
    """Load it onto the GPU, if there is one.

    Args:
        source: a run directory, an adapter folder, a checkpoint folder or a hub id.
        base: leave the adapter off.
        base_model: where an adapter's base is now, if not where its files say.
        system: the system prompt; None: that of the training, where all samples had the same; "": none.
        reasoning: let the model think first, where its chat template begins a thought.

    Raises:
        ModelError: there is no such model, or its chat template takes no system prompt.
    """

    check_there(source)
    trained_with = system_prompt_of(source) or ""
    device = device_here()
    model, processor = load_trained(source, device, base=base, base_model=base_model)
    if system:
        _check_system(processor, system, source)
    encoder = Encoder(processor, max_seq_length=2**31, video=video_config_of(source))
    return Trained(model, encoder, trained_with if system is None else system, reasoning)


def _system_message(text: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": [{"type": "text", "text": text}]}] if text else []


def _check_system(processor: Any, system: str, source: str) -> None:
    """The words must come out of the chat template."""
    from jinja2 import TemplateError

    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    try:
        with_it, without = (
            processor.apply_chat_template([*_system_message(text), *question], tokenize=False, add_generation_prompt=True)
            for text in (system, "")
        )
    except TemplateError as error:
        raise ModelError(f"--system: the chat template of '{source}' refuses a system prompt ({error}); put it into the question") from None
    if with_it == without:
        raise ModelError(f"--system: the chat template of '{source}' leaves a system prompt out; put it into the question")
