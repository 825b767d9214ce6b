"""Read every sample of some shards: what is unusable and where, what stands there twice, and what is held out but trained on too."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from vlm_dist.config_model import VideoConfig
from vlm_dist.data.dataset import open_dataset
from vlm_dist.data.samples import Sample, parse_sample
from vlm_dist.data.storage import Storage
from vlm_dist.data.tally import Tally, summed
from vlm_dist.errors import BadSample, DataError

if TYPE_CHECKING:
    from vlm_dist.config import DataConfig
    from vlm_dist.data.encode import Encoder

DIGEST_BYTES = 16
LONG_ANSWER = 4  # words, from which on answers that are nearly the same are told
LONGEST_ANSWER = 200  # characters that are compared
MOST_ALIKE = 10  # patterns that are told


@dataclass
class Problem:
    """One sample that cannot be used, or (`key` empty) a shard that cannot be read to its end."""

    shard: str
    key: str
    reason: str


@dataclass
class Twin:
    """A sample whose pictures stood in an earlier one too."""

    shard: str
    key: str
    earlier_shard: str
    earlier_key: str
    same_text: bool
    """The whole conversation is the same, not the pictures alone."""


@dataclass
class Findings:
    """What `verify` found. Training and held-out samples are counted together."""

    shards: int = 0
    samples: int = 0
    usable: int = 0
    problems: list[Problem] = field(default_factory=list)
    duplicates: list[Twin] = field(default_factory=list)
    """Training samples with the pictures and the text of an earlier training sample; each epoch sees them so many times."""
    repeated_pictures: int = 0
    """Training samples with the pictures of an earlier one and other text, as where there are several questions about a picture."""
    in_training: list[Twin] = field(default_factory=list)
    """Held-out samples whose pictures are trained on: their score is no score on new pictures."""
    notes: dict[str, dict[str, int]] = field(default_factory=dict)
    """What nothing reads, what is changed or left out: kind, name, samples; see tally.py."""
    answers: dict[str, Any] = field(default_factory=dict)
    """`different`: how many different last answers the training samples have; `most_common`: the most frequent one with its `share`;
    `near_identical`: longer answers that differ in case, punctuation or numbers alone, as [pattern, samples, forms]."""

    @property
    def sound(self) -> bool:
        return not self.problems and not self.in_training

    def to_dict(self) -> dict[str, Any]:
        return {"sound": self.sound, **asdict(self)}


@dataclass
class _Seen:
    """A usable sample: its key, and what tells it from others."""

    shard: str
    key: str
    pictures: bytes
    text: bytes
    answer: str
    """The last thing that an assistant says, cut."""


def verify(
    train: list[str], heldout: list[str], config: DataConfig, *, processes: int | None = None, encoder: Encoder | None = None
) -> Findings:
    """Read every sample of both lists, decode its pictures, encode it as training would, and compare all.

    A picture counts as the same where its decoded RGB pixels are; samples without a picture are compared by their text.

    Args:
        train: paths of shards.
        heldout: paths of shards that should hold no picture of `train`.
        config: max_image_pixels and caption_prompt count.
        processes: shards are read by so many; None: one per CPU.
        encoder: of the model that is to be trained; None: samples are not encoded.
    """
    found, seen = Findings(shards=len(train) + len(heldout)), {"train": [], "heldout": []}
    where = [*(("train", shard) for shard in train), *(("heldout", shard) for shard in heldout)]
    read = partial(_read_shard, max_image_pixels=config.max_image_pixels, caption_prompt=config.caption_prompt, encoder=encoder)
    for (part, _), (samples, problems, notes) in zip(where, _map(read, [shard for _, shard in where], processes), strict=True):
        found.notes = summed([found.notes, notes])
        seen[part] += samples
        found.problems += problems
        found.usable += len(samples)
        found.samples += len(samples) + sum(bool(problem.key) for problem in problems)
    earlier = _compare_training(seen["train"], found)
    found.answers = _compare_answers([sample.answer for sample in seen["train"]])
    for sample in seen["heldout"]:
        if (first := earlier.get(sample.pictures)) is not None:
            found.in_training.append(_twin(sample, first))
    return found


def most_common_reasons(problems: Iterable[Problem], limit: int = 10) -> list[tuple[str, int]]:
    """Reasons with how often they stand there, numbers left out: "KEY.0.jpg: 70 x 70 pixels ..." is one reason whatever the size."""
    return Counter("".join("#" if char.isdigit() else char for char in problem.reason) for problem in problems).most_common(limit)


def _compare_training(samples: list[_Seen], found: Findings) -> dict[bytes, _Seen]:
    """Fill in what stands there twice; returns the first sample of each digest."""
    first_by_pictures: dict[bytes, _Seen] = {}
    first_by_both: dict[bytes, _Seen] = {}
    for sample in samples:
        first = first_by_both.setdefault(sample.pictures + sample.text, sample)
        if first is not sample:
            found.duplicates.append(_twin(sample, first))
        elif first_by_pictures.setdefault(sample.pictures, sample) is not sample:
            found.repeated_pictures += 1
    return first_by_pictures


def _compare_answers(answers: list[str]) -> dict[str, Any]:
    if not answers:
        return {}
    counts = Counter(answers)
    text, times = counts.most_common(1)[0]
    forms: dict[str, set[str]] = {}
    for answer in counts:
        if answer.count(" ") >= LONG_ANSWER - 1:
            forms.setdefault(" ".join(re.sub(r"\d+", "#", re.sub(r"[^\w\s]|_", "", answer.lower())).split()), set()).add(answer)
    alike = [[pattern, sum(counts[one] for one in group), len(group)] for pattern, group in forms.items() if len(group) > 1]
    return {
        "different": len(counts),
        "most_common": {"text": text, "share": round(times / len(answers), 4)},
        "near_identical": sorted(alike, key=lambda row: (-row[1], row[0]))[:MOST_ALIKE],
    }


def _twin(sample: _Seen, first: _Seen) -> Twin:
    return Twin(sample.shard, sample.key, first.shard, first.key, sample.text == first.text)


def _map(read: Any, shards: list[str], processes: int | None) -> Iterable[tuple[list[_Seen], list[Problem], dict]]:
    """`read` of every shard, in order, with a progress bar on a terminal."""
    import multiprocessing

    from rich.progress import track

    bar = partial(track, description="shards", total=len(shards), transient=True, disable=not sys.stderr.isatty())
    number = min(processes or os.cpu_count() or 1, len(shards))
    if number <= 1:
        yield from bar(map(read, shards))
        return
    with ProcessPoolExecutor(number, multiprocessing.get_context("forkserver")) as pool:
        yield from bar(pool.map(read, shards))


def _read_shard(
    shard: str, *, max_image_pixels: int, caption_prompt: str, encoder: Encoder | None
) -> tuple[list[_Seen], list[Problem], dict[str, dict[str, int]]]:
    samples, problems, tally = [], [], Tally()
    try:
        dataset = open_dataset([shard], "data", Storage())
        for number in range(len(dataset.index)):
            raw: dict[str, Any] = {"__key__": f"(sample {number})"}
            try:
                raw = dataset.raw(number)
                sample = parse_sample(raw, max_image_pixels=max_image_pixels, caption_prompt=caption_prompt)
                seen = _Seen(shard, sample.key, *_digests(sample), _last_answer(sample))
                tally.add(sample.notes if encoder is None else encoder.encode(sample).notes)
            except BadSample as reason:
                problems.append(Problem(shard, str(raw["__key__"]), str(reason)))
            else:
                samples.append(seen)
    except (DataError, OSError) as error:
        problems.append(Problem(shard, "", str(error)))
    return samples, problems, tally.to_dict()


def _last_answer(sample: Sample) -> str:
    said = [message for message in sample.messages if message["role"] == "assistant"][-1]
    return " ".join(part["text"] for part in said["content"] if "text" in part).strip()[:LONGEST_ANSWER]


def _digests(sample: Sample) -> tuple[bytes, bytes]:
    """Of the decoded pictures and frames of videos, and of the conversation.

    Raises:
        BadSample: a video is damaged.
    """
    said = [sample.messages, sample.objects] if sample.objects else sample.messages
    text = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=DIGEST_BYTES).digest()
    if not sample.images and not sample.videos:
        return text, text
    pictures = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for image in sample.images:
        pictures.update(f"{image.width} x {image.height}".encode())
        pictures.update(image.tobytes())
    for clip in sample.videos:
        pictures.update(clip.shown(VideoConfig()).frames.numpy().tobytes())
    return pictures.digest(), text
