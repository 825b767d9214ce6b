"""A checkpoint's processor, proven to put pictures into the text."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vlm_dist.config import ModelConfig
from vlm_dist.errors import ModelError
from vlm_dist.models.processor_settings import check_settings
from vlm_dist.models.source import not_loadable

if TYPE_CHECKING:
    from transformers import ProcessorMixin

logger = logging.getLogger(__name__)


def load_processor(config: ModelConfig, name: str) -> ProcessorMixin:
    """The checkpoint's processor, with the settings of `model.processor`.

    Raises:
        ModelError: it has none, none with a chat template, or one whose chat template leaves pictures out.
    """
    from transformers import AutoProcessor

    import vlm_dist.models.mini_vlm  # noqa: F401  (registers the architecture)

    try:
        processor = AutoProcessor.from_pretrained(
            name, revision=config.revision, trust_remote_code=config.trust_remote_code, **config.processor
        )
    except (ImportError, OSError, ValueError) as error:
        raise not_loadable(name, error) from None
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ModelError(
            f"model.name: '{name}' has a {type(processor).__name__}, which takes no pictures; use a vision-language checkpoint"
        )
    processor.chat_template = _one_template(processor.chat_template or getattr(processor.tokenizer, "chat_template", None))
    if processor.chat_template is None:
        raise ModelError(
            f"model.name: the processor of '{name}' has no chat template; use an instruction-tuned checkpoint, "
            "or add a chat_template.jinja to the folder"
        )
    if config.processor:
        plain = AutoProcessor.from_pretrained(name, revision=config.revision, trust_remote_code=config.trust_remote_code)
        check_settings(config.processor, plain, name)
    _check_pictures(processor, name)
    return processor


def _one_template(found: str | dict[str, str] | None) -> str | None:
    """Of several chat templates the one called "default"."""
    return found.get("default") if isinstance(found, dict) else found


def _check_pictures(processor: Any, name: str) -> None:
    """One picture through template and processor: picture tokens must come out."""
    from PIL import Image

    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    ids = [number for number in processor.image_token_ids if number is not None]
    if not ids:
        raise ModelError(
            f"model.name: the processor of '{name}' names no picture token (image_token_id); complete its processor_config.json"
        )
    try:
        text = processor.apply_chat_template([message], tokenize=False)
        found = processor(text=[text], images=[[Image.new("RGB", (56, 56))]])["input_ids"][0]
    except Exception as error:  # templates raise jinja2's errors, processors whatever they like
        raise ModelError(
            f"model.name: the processor of '{name}' fails on one picture and one word: {str(error).strip().splitlines()[0][:200]}"
        ) from None
    if not set(ids) & {int(number) for number in found}:
        raise ModelError(
            f"model.name: the chat template of '{name}' puts no picture token into the text; "
            "its chat_template.jinja must write one for a part of type image"
        )


def check_vocabulary(processor: Any, model: Any, name: str) -> None:
    """Tokens need a row of the embedding each; a sample that has one without would end the run with an index error.

    Raises:
        ModelError: a special token has none.
    """
    tokenizer, rows = processor.tokenizer, model.get_input_embeddings().num_embeddings
    pictures = () if getattr(model, "embeds_picture_tokens", True) else processor.image_token_ids
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows and number not in pictures)
    if not beyond:
        return
    words = f"the tokenizer of '{name}' has {len(tokenizer)} tokens, the embedding {rows} rows; {beyond[0][1]!r} is number {beyond[0][0]}"
    if any(token in tokenizer.all_special_tokens for _, token in beyond):
        raise ModelError(f"model.name: {words}; use the tokenizer that the weights were saved with, or enlarge the embedding")
    logger.warning("model.name: %s; samples with such tokens cannot be trained on", words)
