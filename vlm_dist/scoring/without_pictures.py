"""How much of a score needs eyes: the same questions with the pictures greyed out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm_dist.config import EvaluationConfig
from vlm_dist.data.encode import Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.data.video import grey_clip
from vlm_dist.distributed import Ranks
from vlm_dist.scoring.evaluate import ALONE, Evaluation, Watch, evaluate

GREY = 128


def evaluate_whole(
    model: Any, encoder: Encoder, samples: list[Sample], config: EvaluationConfig, ranks: Ranks,
    watch: Watch = ALONE,
) -> Evaluation:  # fmt: skip
    """`evaluate`, and where `evaluation.without_pictures` says so the same questions with greyed pictures: what is right then too needs no
    eyes."""
    found = evaluate(model, encoder, samples, config, ranks, watch)
    answered = set(found.numbers)
    shown = [number for number, sample in enumerate(samples) if (sample.images or sample.videos) and number in answered]
    if not config.without_pictures or not shown:
        return found
    blind = evaluate(model, encoder, [greyed(samples[number]) for number in shown], config, ranks, watch)
    places = {shown[number]: row for number, row in zip(blind.numbers, blind.rows, strict=True)}
    rows = [
        {**row, "without_picture": {key: places[number][key] for key in ("answer", "exact")}} if number in places else row
        for row, number in zip(found.rows, found.numbers, strict=True)
    ]
    return replace(found, rows=rows, blind=replace(blind, numbers=[shown[number] for number in blind.numbers]))


def without_pictures_in_words(scores: dict[str, Any]) -> str:
    """A line about the `without_pictures` of some scores."""
    return (
        f"with the pictures greyed out {scores['exact_match']:.1%} exact of the {scores['samples']} questions that have one, with them "
        f"{scores['with_pictures']['exact_match']:.1%}; right with the picture alone: {scores['needs_eyes']:.1%}"
    )


def greyed(sample: Sample) -> Sample:
    """The same with pictures and videos of the same sizes that show nothing."""
    from PIL import Image

    return replace(
        sample,
        images=[
            image.new_full(image.shape, GREY) if hasattr(image, "new_full") else Image.new("RGB", image.size, (GREY,) * 3)
            for image in sample.images
        ],
        videos=[grey_clip(clip, GREY) for clip in sample.videos],
    )
