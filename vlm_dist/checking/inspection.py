"""What the model is fed, sample by sample, from the stream that trains, and the classic mistakes in words."""

from __future__ import annotations

import base64
import io
import itertools
import logging
from typing import TYPE_CHECKING, Any

from vlm_dist.checking.heat import Heat, drawn_over
from vlm_dist.checking.marking import with_marks
from vlm_dist.checking.statistics import moving_statistics
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import IGNORED, Encoded
from vlm_dist.data.frames import Frame
from vlm_dist.data.preparer import Preparer
from vlm_dist.data.rows import Slot
from vlm_dist.data.samples import Sample
from vlm_dist.data.stream import Stream
from vlm_dist.data.view import patch_size, pictures_as_seen, shows_pictures_whole, strip, videos_as_seen
from vlm_dist.inputs.opened import Inputs, inputs_apart

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlm_dist.config import Config

logger = logging.getLogger(__name__)
MEASURED = 300  # samples whose lengths are looked at
ENLARGED = 1.5  # times on a side, from which on a picture counts as enlarged
LARGEST = 448  # pixels on the longer side of a picture on the page


def inspect(config: Config, count: int = 8, *, heat: bool = False) -> dict[str, Any]:
    """The first `count` rows of training, as plain data.

    Args:
        heat: load the model, and draw the norms of its vision features over the pictures.

    Returns:
        `rows` (each a list of samples with `key`, `tokens`, `segments`, `pictures`, `flags`, ...), `refused` (samples that training
        leaves out, with the reason), `notes` (what nothing reads, is changed or left out: kind, name, samples), `lengths` of up to 300
        samples, `flow` (what comes out of each part of the model for the first sample), `weights` (what is in 16
        bit, what has no adapter), and `flags`: what is wrong with many.

    Raises:
        DataError, ModelError: as training would.
    """
    with inputs_apart(config) as inputs:
        warm = Heat(inputs) if heat else None
        stream = inputs.stream()
        rows, refused, flow = [], [], []
        for row in itertools.islice(stream.preview(), count):
            shown = []
            for slot, encoded in row:
                if encoded is None:
                    refused.append({"key": (slot.raw or {}).get("__key__", "?"), "reason": str(slot.problem)})
                else:
                    shown.append(_describe(stream.preparer, slot, encoded, warm))
                    flow = flow or _flow(inputs, encoded)
            rows.append(shown)
        lengths = _lengths(stream)
        moving = moving_statistics(inputs.config, inputs.hf_config, inputs.family)

        weights = _weights(inputs)
    found = {
        "name": config.name, "model": config.model.name or config.model.kind, "max_seq_length": config.data.max_seq_length,
        "packing": stream.pack, "rows": rows, "refused": [*refused, *lengths.pop("refused")], "lengths": lengths,
        "flow": flow, "weights": weights, "notes": stream.encoder.tally.to_dict(),
    }  # fmt: skip
    return found | {"flags": [*_flags(found), *([moving] if moving else [])]}


def _flow(inputs: Inputs, encoded: Encoded) -> list[dict[str, Any]]:
    """Of one sample; nothing where the model asks for numbers that are not there."""
    from vlm_dist.planning.flow import data_flow

    try:
        batch = collate([encoded], inputs.processor.tokenizer.pad_token_id)
        return [stage.to_dict() for stage in data_flow(inputs.config, inputs.hf_config, inputs.family, batch)]
    except Exception as error:  # a model's code raises whatever it likes where numbers are missing
        logger.warning("inspect: no data flow: %s", (str(error).splitlines() or [""])[0][:200])
        return []


def _weights(inputs: Inputs) -> list[str]:
    """What stays in 16 bit beside 4-bit weights, and what has no adapter, in words."""
    from vlm_dist.planning.plan import torch_dtype
    from vlm_dist.planning.twin import weights_of_twin

    return weights_of_twin(inputs.config, inputs.hf_config, inputs.family, torch_dtype(inputs.config))


def _describe(preparer: Preparer, slot: Slot, encoded: Encoded, warm: Heat | None) -> dict[str, Any]:
    assert slot.raw is not None
    processor, sample = preparer.encoder.processor, preparer.parse(slot.raw)
    segments = _segments(encoded, processor)
    seen = pictures_as_seen(encoded, processor)
    pictures = [_picture(image, patch_size(processor)) for image in seen]
    marked = _marked(preparer, sample, encoded, seen, pictures) if sample.objects else {}
    for picture, image, norms in zip(pictures, seen, warm.maps(encoded) if warm else [], strict=False):
        picture["heat"] = _as_url(drawn_over(_enlarged(image), norms))
        picture["norms"] = [round(float(norms.min()), 3), round(float(norms.max()), 3)]
    supervised = int((encoded.labels[:, 1:] != IGNORED).sum())
    return {
        "key": encoded.key,
        "shard": sample.shard,
        "tokens": encoded.length,
        "picture_tokens": int(encoded.picture.sum()),
        "supervised": supervised,
        "sizes": [[int(image.shape[-1]), int(image.shape[-2])] if hasattr(image, "shape") else list(image.size) for image in sample.images],
        "pictures": pictures,
        **({"videos": _videos(preparer, sample, encoded)} if sample.videos else {}),
        "segments": segments,
        "flags": _sample_flags(encoded, sample, segments, pictures, preparer),
        **marked,
    }


def _videos(preparer: Preparer, sample: Sample, encoded: Encoded) -> list[dict[str, Any]]:
    """Of each video its times, and a strip of its frames as the vision tower is shown them; without where they are among the pictures."""
    config, seen = preparer.encoder.videos.config, videos_as_seen(encoded, preparer.encoder.processor)
    found = []
    for number, clip in enumerate(sample.videos):
        times = [round(float(time), 3) for time in clip.times(config)]
        url = {"url": _as_url(strip(seen[number], times))} if number < len(seen) else {}
        found.append({"name": clip.name, "seconds": round(float(clip.duration), 3), "size": list(clip.full_size), "times": times, **url})
    return found


def _marked(preparer: Preparer, sample: Sample, encoded: Encoded, seen: list[Image], pictures: list[dict]) -> dict[str, Any]:
    """The objects, drawn over what the vision tower is shown; where that is tiles, over pictures of their own."""
    from torchvision.transforms.functional import to_pil_image

    frames, urls = preparer.encoder.placing.frames(sample.sizes), []
    for number in sorted({one.image for one in sample.objects}):
        objects = [one for one in sample.objects if one.image == number]
        if shows_pictures_whole(encoded, seen, len(sample.images)):
            shown = _gridded(seen[number], pictures[number]["patch"])
            pictures[number]["url"] = _as_url(with_marks(shown, objects, frames[number]))
        else:
            image = sample.images[number]
            image = to_pil_image(image) if hasattr(image, "shape") else image
            urls.append(_as_url(with_marks(_enlarged(image), objects, Frame(0, 0, *image.size))))
    convention = preparer.encoder.placing.convention.name
    return {"objects": [one.to_dict() for one in sample.objects], "convention": convention, "marked": urls}


def _segments(encoded: Encoded, processor: Any) -> list[dict[str, Any]]:
    """Runs of tokens of one kind: picture (folded to a number; `of` says whether of a video), supervised, or other."""
    supervised = (encoded.labels[0] != IGNORED).tolist()
    kinds = [
        "picture" if picture else "supervised" if label else "other"
        for picture, label in zip(encoded.picture.tolist(), supervised, strict=True)
    ]
    ids, found, of_videos = encoded.inputs["input_ids"][0].tolist(), [], {one for one in processor.video_token_ids if one is not None}
    for (kind, is_video), run in itertools.groupby(range(len(ids)), key=lambda place: (kinds[place], ids[place] in of_videos)):
        numbers = [ids[place] for place in run]
        told = {"text": ""} if kind == "picture" else {"text": processor.tokenizer.decode(numbers, skip_special_tokens=False)}
        told |= {"of": "video" if is_video else "picture"} if kind == "picture" else {}
        found.append({"kind": kind, "tokens": len(numbers), **told, "last": numbers[-1]})
    return found


def _picture(image: Image, patch: int | None) -> dict[str, Any]:
    return {"size": list(image.size), "patch": patch, "url": _as_url(_gridded(image, patch))}


def _gridded(image: Image, patch: int | None) -> Image:
    """The picture with its patch grid."""
    from PIL import Image as Images
    from PIL import ImageDraw

    shown = _enlarged(image)
    scale = shown.width // image.width
    if patch:
        lines = Images.new("RGBA", shown.size)
        draw = ImageDraw.Draw(lines)
        for x in range(0, shown.width, patch * scale):
            draw.line([(x, 0), (x, shown.height)], (128, 128, 128, 140))
        for y in range(0, shown.height, patch * scale):
            draw.line([(0, y), (shown.width, y)], (128, 128, 128, 140))
        shown = Images.alpha_composite(shown.convert("RGBA"), lines).convert("RGB")
    return shown


def _enlarged(image: Image) -> Image:
    """By a whole number, so that its pixels stay sharp."""
    from PIL import Image as Images

    scale = max(1, LARGEST // max(image.size))
    return image.resize((image.width * scale, image.height * scale), Images.Resampling.NEAREST)


def _as_url(image: Image) -> str:
    image.thumbnail((2 * LARGEST, 2 * LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _sample_flags(encoded: Encoded, sample: Sample, segments: list[dict], pictures: list[dict], preparer: Preparer) -> list[str]:
    tokenizer, flags = preparer.encoder.processor.tokenizer, []
    ids = encoded.inputs["input_ids"][0].tolist()
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        flags.append("the sequence begins with two BOS tokens: the chat template writes one, and the tokenizer another")
    turns = sum(message["role"] == "assistant" for message in sample.messages)
    learnt = [segment for segment in segments if segment["kind"] == "supervised"]
    if len(learnt) < turns:
        flags.append(f"{turns} assistant turns, but {len(learnt)} are supervised")
    special = set(tokenizer.all_special_ids)
    if any(segment["last"] not in special for segment in learnt):
        flags.append("an assistant turn ends without an end-of-turn token: the model does not learn to stop there")
    said = "".join(segment["text"] for segment in segments)
    for message in sample.messages:
        words = " ".join(part.get("text", "") for part in message["content"]).split()
        if message["role"] == "system" and words and words[0] not in said:
            flags.append("the chat template leaves the system prompt out")
    if (sample.images or sample.videos) and not encoded.picture.any():
        flags.append(f"the sample has a {'picture' if sample.images else 'video'}, the sequence no picture token")
    size = [(image.shape[-1], image.shape[-2]) if hasattr(image, "shape") else image.size for image in sample.images]
    if len(pictures) == len(size) and any(max(p["size"]) > ENLARGED * max(s) for p, s in zip(pictures, size, strict=True)):
        shown = ", ".join(f"{s[0]} x {s[1]} to {p['size'][0]} x {p['size'][1]}" for p, s in zip(pictures, size, strict=True))
        flags.append(f"enlarged: {shown}; larger originals, or a smaller size in model.processor, would waste less")
    return flags


def _lengths(stream: Stream) -> dict[str, Any]:
    """Tokens of the first samples of training, and those that cannot be used."""
    found, refused = [], []
    for slot in itertools.islice(stream.measured(), min(MEASURED, stream.num_samples)):
        if slot.length is None:
            refused.append({"key": (slot.raw or {}).get("__key__", "?"), "reason": str(slot.problem)})
        else:
            found.append(slot.length.tokens)
    found.sort()
    shares = (
        {name: found[min(len(found) - 1, int(share * len(found)))] for name, share in (("median", 0.5), ("p99", 0.99), ("longest", 1))}
        if found
        else {}
    )
    return {"samples": len(found) + len(refused), **shares, "refused": refused}


def _flags(found: dict[str, Any]) -> list[str]:
    """What concerns the whole, and how many samples have each flag of their own."""
    flags = []
    samples = [sample for row in found["rows"] for sample in row]
    too_long = sum("too long" in one["reason"] for one in found["refused"])
    if too_long:
        flags.append(f"{too_long} of {found['lengths']['samples']} samples are longer than data.max_seq_length={found['max_seq_length']}")
    if not samples:
        flags.append("none of the first samples can be used")
    for flag in dict.fromkeys(flag.split(":")[0] for sample in samples for flag in sample["flags"]):
        count = sum(any(one.startswith(flag) for one in sample["flags"]) for sample in samples)
        flags.append(f"{count} of {len(samples)} samples: {flag}")
    return flags
