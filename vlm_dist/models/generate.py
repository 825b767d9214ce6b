"""Answers from a model: one batch of prompts in, the new text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def generate(
    model: Any, processor: Any, batch: dict[str, Any], max_new_tokens: int, stops: Callable[[], bool] | None = None, **options: Any
) -> list[str]:  # fmt: skip
    """Continue each prompt of a left-padded batch, greedily unless `options` (transformers' generation settings) say otherwise.

    Args:
        stops: asked after each token; where it says so, the answers end there.

    Returns:
        The generated text of each row, special tokens removed.

    Not under `inference_mode`: small weights that ZeRO-3 gathers there stay, and could not be trained with afterwards.
    """
    import torch
    from transformers import StoppingCriteriaList

    from vlm_dist.upstream.deepspeed import gathered_when_read
    from vlm_dist.upstream.transformers import taken_by_generate

    inputs = taken_by_generate(model, {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"})
    if stops is not None:
        asks = stops

        def is_over(tokens: Any, *_: Any, **__: Any) -> Any:
            return torch.full((len(tokens),), asks(), device=tokens.device)

        options["stopping_criteria"] = [*options.get("stopping_criteria", []), is_over]
    if "stopping_criteria" in options:
        options["stopping_criteria"] = StoppingCriteriaList(options["stopping_criteria"])
    settings = {"do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id, **options}
    with torch.no_grad(), _ready_to_generate(model), gathered_when_read(model), autocast(model):
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def encode_chat(processor: Any, messages: list[dict[str, Any]], pictures: list[Any]) -> dict[str, Any]:
    """The tensors of one conversation that the assistant is to continue."""
    import torch

    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    starts = bool(bos and text.startswith(bos))  # some templates write it, some leave it to the tokenizer
    inputs = processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt", add_special_tokens=not starts)
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def autocast(model: Any) -> Any:
    """Compute in the base's number type, where adapters are held in float32 beside a base in 16 bit."""
    import torch

    halves = (torch.bfloat16, torch.float16)
    dtype = getattr(model, "compute_dtype", None) or next((p.dtype for p in model.parameters() if p.dtype in halves), torch.float32)
    return torch.autocast(model.device.type, dtype=dtype, enabled=dtype in halves)


@contextmanager
def _ready_to_generate(model: Any) -> Iterator[None]:
    """Evaluation mode with the KV cache on and checkpointing off, and back."""
    was_training = model.training
    config = model.config.get_text_config()
    use_cache = config.use_cache
    model.eval()
    config.use_cache = True
    try:
        yield
    finally:
        config.use_cache = use_cache
        model.train(was_training)
