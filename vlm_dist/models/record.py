"""What an adapter folder says of itself: its base, its preprocessing, and a probe, i.e. inputs with the logits that the trained model gave.

Loading checks all three, because each has gone wrong in silence elsewhere: adapter keys that match nothing after an upgrade, an adapter
on another base of the same shape, a processor that resizes differently when serving (boxes then come out shifted).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dist.config import ModelConfig
from vlm_dist.errors import ModelError
from vlm_dist.models.files import RECORD, digests_of, record_digest
from vlm_dist.models.generate import autocast, encode_chat
from vlm_dist.models.source import fingerprint

if TYPE_CHECKING:
    import torch

KEPT = 64  # logits of the probe: the largest so many of each row
QUESTIONS = ("Describe the picture.", "What is in the middle?")
UNSTEADY = ("_name_or_path", "transformers_version", "processor_class", "auto_map")  # change without changing what the model sees


def make_record(
    model: Any, processor: Any, base: ModelConfig, fingerprint_of_base: str, system_prompt: str | None = None
) -> dict[str, Any]:
    """The record of a trained model. On several ranks, all must call it: the probe runs the model.

    Args:
        system_prompt: what every sample of the training began with, if all had the same.
    """
    return {
        "version": 1,
        "base": {
            **base.model_dump(mode="json", include={"name", "revision", "load_in_4bit", "dtype", "keep_16bit"}),
            "fingerprint": fingerprint_of_base,
        },
        "preprocessing": describe_processor(processor),
        "probe": probe(model, processor),
        "buffers": _digests_of_buffers(model),
        "made_with": made_with(model),
        "system_prompt": system_prompt,
    }


def write_record(record: dict[str, Any], folder: Path) -> None:
    """Write it beside what it speaks of, once that is complete: sha256 of each file, and of the record itself, are added."""
    known = {**record, "sha256": digests_of(folder)}
    known["record_sha256"] = record_digest(known)
    (folder / RECORD).write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of an adapter folder; None for one that was saved by something else.

    Raises:
        ModelError: it is damaged.
    """
    return _read(folder, "base", "preprocessing", "probe")


def read_system_prompt(folder: Path) -> str | None:
    """The one system prompt that an adapter or model was trained with, if its folder remembers any.

    Raises:
        ModelError: the record is damaged.
    """
    return (_read(folder) or {}).get("system_prompt")


def _read(folder: Path, *needed: str) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        others = {name: record[name] for name in ("made_with", "buffers") if name in record}
        return {"system_prompt": record.get("system_prompt"), **others, **{name: record[name] for name in needed}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is damaged ({error}); export the run again, or delete this file to load without checks") from None


def check_base(record: dict[str, Any], name: str, revision: str | None) -> None:
    """Raises ModelError where `name` holds other weights than those that the adapter was trained on."""
    if fingerprint(name, revision) != record["base"]["fingerprint"]:
        raise ModelError(
            f"the adapter was trained on other weights than '{name}' holds now (then: {record['base']['name']}); "
            "give the checkpoint that it was trained on"
        )


def check_processor(record: dict[str, Any], processor: Any) -> None:
    """Raises ModelError where the processor works otherwise than in training; names the first value that differs."""
    then, now = record["preprocessing"], describe_processor(processor)
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            raise ModelError(
                f"preprocessing differs from training: {name} was {then.get(name)!r}, is {now.get(name)!r}; "
                "load the processor that was saved beside the adapter, with the version of transformers that trained it"
            )


def check_probe(record: dict[str, Any], model: Any, processor: Any) -> None:
    """Raises ModelError where the loaded model gives other logits than the trained one did, by more than the number type explains.

    Both computed in one type: a base held in 4 bit computes in model.dtype whatever it was saved with (`compute_in`). Then only the
    order of sums differs (kernels, another machine), which moves the logits by about sqrt(2 N) e of their norm, with e the root mean
    square of one rounding and N roundings one after another, some 12 a layer, in each of two models. bfloat16 (e = 2e-3, half of 2^-8):
    sqrt(2 x 12 x 100) e = 10 % after 100 layers; the limit is half as much again. float32 (e = 3e-8): 2e-6; what an adapter learns is
    seldom below a hundredth of the norm, so a limit of 1 % tells it apart and still forgives a lot.
    """
    difference = compare_probes(record["probe"], probe(model, processor))
    limit = 0.01 if record["probe"]["dtype"] == "float32" and str(model.dtype) == "torch.float32" else 0.15
    if difference > limit:
        apart = f"the loaded model's logits differ from the trained one's by {difference:.1%} (limit {limit:.0%})"
        raise ModelError(f"{apart}: {_what_differs(record, model)}")


def _what_differs(record: dict[str, Any], model: Any) -> str:
    """Weights of the base, preprocessing and the adapter's files have been compared before; what else the record knows."""
    then, now = record.get("made_with", {}), made_with(model)
    buffers, found = record.get("buffers", {}), _digests_of_buffers(model)
    reasons = [f"{name} was {then[name]}, is {now[name]}" for name in now if name in then and then[name] != now[name]]
    if moved := sorted(name for name in buffers if found.get(name) != buffers[name]):
        reasons.insert(0, f"{len(moved)} buffers of the base are not those of the training, e.g. {moved[0]}")
    if reasons:
        return "; ".join(reasons) + "; base and preprocessing are the same"
    known = "" if then else " (vlm_dist.json is of a version that did not note libraries and buffers)"
    return (
        f"base, preprocessing, libraries and device are those of the training{known}, so the adapter's weights are not; "
        "export the run again, or copy the folder whole"
    )


def made_with(model: Any) -> dict[str, str]:
    """What decides numbers besides weights and inputs: versions of the libraries that compute, and the kind of device."""
    from importlib import metadata

    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    return {**versions, "device": model.device.type}


def _digests_of_buffers(model: Any) -> dict[str, str]:
    """Of the stored buffers (running statistics), which are in no adapter of PEFT's: a few digits of each one's sha256."""
    stored = set(model.state_dict())
    return {
        name: hashlib.sha256(buffer.detach().float().cpu().numpy().tobytes()).hexdigest()[:8]
        for name, buffer in model.named_buffers()
        if name in stored
    }


def compare_probes(then: dict[str, Any], now: dict[str, Any]) -> float:
    """Norm of the difference of the kept logits over the norm of the logits (both centred), the worst row's."""
    import torch

    worst = 0.0
    for row, again in zip(then["rows"], now["rows"], strict=True):
        new = dict(zip(again["tokens"], again["logits"], strict=True))
        floor = min(again["logits"])  # a token that fell out of the largest lies at most there
        expected = torch.tensor(row["logits"])
        found = torch.tensor([new.get(token, floor) for token in row["tokens"]])
        scale = (expected - expected.mean()).norm().clamp_min(1e-6)
        worst = max(worst, float((found - expected).norm() / scale))
    return worst


def probe(model: Any, processor: Any) -> dict[str, Any]:
    """Logits of the next token after a drawn picture and a question, for each of the questions: the largest, with their tokens."""
    rows = []
    for logits in next_token_logits(model, probe_inputs(processor), processor):
        values, tokens = logits.topk(min(KEPT, logits.numel()))
        rows.append({"tokens": tokens.tolist(), "logits": [round(value, 5) for value in values.tolist()]})
    return {"dtype": str(model.dtype).removeprefix("torch."), "rows": rows}


def probe_inputs(processor: Any) -> list[tuple[list[dict[str, Any]], list[Any]]]:
    """(messages, pictures) of the probe, drawn on the spot: the same everywhere."""
    from PIL import Image, ImageDraw

    cases = []
    for number, question in enumerate(QUESTIONS):
        picture = Image.new("RGB", (96 + 32 * number, 80), "white")
        draw = ImageDraw.Draw(picture)
        for place in range(4):
            draw.rectangle((8 + 20 * place, 10 + 12 * place, 24 + 20 * place, 34 + 12 * place), fill=(60 * place, 200 - 50 * place, 90))
        content = [{"type": "image"}, {"type": "text", "text": question}]
        cases.append(([{"role": "user", "content": content}], [picture]))
    return cases


def next_token_logits(model: Any, cases: list[tuple[list[dict[str, Any]], list[Any]]], processor: Any) -> list[torch.Tensor]:
    """Logits [V], float32 on the CPU, of the token that follows each prompt."""
    import torch

    found = []
    was_training = model.training
    model.eval()
    try:
        for messages, pictures in cases:
            inputs = {name: value.to(model.device) for name, value in encode_chat(processor, messages, pictures).items()}
            with torch.no_grad(), autocast(model):
                found.append(model(**inputs, logits_to_keep=1, use_cache=False).logits[0, -1].float().cpu())
    finally:
        model.train(was_training)
    return found


def describe_processor(processor: Any) -> dict[str, Any]:
    """Class and values of everything between a sample and the model's inputs."""
    images = processor.image_processor
    values = {f"image_processor.{name}": value for name, value in images.to_dict().items() if name not in UNSTEADY}
    own = {name: getattr(processor, name) for name in ("patch_size", "num_image_tokens", "image_seq_len", "image_seq_length")
           if hasattr(processor, name)}  # fmt: skip
    described = {
        "class": type(processor).__name__,
        "image_processor.class": type(images).__name__,
        "chat_template.sha256": _digest(processor.chat_template),
        "vocabulary.sha256": _digest(json.dumps(processor.tokenizer.get_vocab(), sort_keys=True)),
        **own,
        **values,
    }
    return json.loads(json.dumps(described, default=str, sort_keys=True))


def _digest(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()
