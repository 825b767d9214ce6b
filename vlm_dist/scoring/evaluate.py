"""Generated answers to held-out questions, compared with the truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from vlm_dist.config import Config, EvaluationConfig
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoded, Encoder
from vlm_dist.data.layout_values import texts_of
from vlm_dist.data.placing import objects_answered
from vlm_dist.data.samples import Sample
from vlm_dist.data.thoughts import has_reasoning, without_generated_thought, without_thought
from vlm_dist.distributed import Ranks
from vlm_dist.errors import BadSample, ConfigError
from vlm_dist.models.generate import generate
from vlm_dist.scoring.boxes import Marks
from vlm_dist.scoring.metrics import (
    LOWER_IS_BETTER,
    WHOLE_SET,
    Metric,
    exact_match,
    find_metric,
    is_about_objects,
    of_whole_set,
    value_of,
)


@dataclass
class Evaluation:
    """Scores, and one row a sample: key, task, kind, prompt, answer, truth, exact."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    """Those asked for besides exact_match."""
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    """(shard, key, reason) of samples whose question cannot be put; they have no row."""
    numbers: list[int] = field(default_factory=list)
    """Of each row: the place of its sample in the list that was given."""
    blind: Evaluation | None = None
    """The same of the samples with pictures, these greyed out."""

    @property
    def scores(self) -> dict[str, Any]:
        """exact_match and the metrics over all, the number of samples, and exact_match by kind of question where samples name one."""
        by_kind = defaultdict(list)
        for row in self.rows:
            if row["kind"]:
                by_kind[row["kind"]].append(row["exact"])
        return {
            "exact_match": _share([row["exact"] for row in self.rows]),
            **{name: self._score(name) for name in self.metrics},
            "samples": len(self.rows),
            "by_kind": {kind: _share(hits) for kind, hits in sorted(by_kind.items())},
            **({} if self.blind is None else {"without_pictures": self._beside(self.blind)}),
        }

    def _beside(self, blind: Evaluation) -> dict[str, Any]:
        """The scores without pictures, those of the same questions with them, and the share that is right with them alone."""
        places = set(blind.numbers)
        seen = Evaluation([row for row, number in zip(self.rows, self.numbers, strict=True) if number in places], self.metrics)
        scores, with_them = blind.scores, seen.scores
        needed = [row["exact"] and not other["exact"] for row, other in zip(seen.rows, blind.rows, strict=True)]
        names = ("exact_match", *self.metrics)
        return {
            "samples": scores["samples"],
            **{name: scores[name] for name in names},
            "with_pictures": {name: with_them[name] for name in names},
            "needs_eyes": _share(needed),
        }

    def _score(self, name: str) -> float:
        if not self.rows:
            return 0.0
        if name in WHOLE_SET:
            return round(of_whole_set(name, [row["answer"] for row in self.rows], [row["truths"] for row in self.rows]), 6)
        values = [row["metrics"][name] for row in self.rows if name in row["metrics"]]
        return round(sum(values) / len(values), 6) if values else 0.0


@dataclass(frozen=True)
class Watch:
    """Who looks on while answers are made."""

    tells: Callable[[int, int], object] = lambda done, total: None
    """Takes the samples that are answered and all of them, before each batch."""
    stops: Callable[[], bool] = lambda: False
    """Asked before each batch and at the end, on every rank as often; says the same on all."""
    cut: Callable[[], bool] | None = None
    """Asked after each token, on this rank: whether to leave it at that, because `stops` will say so too."""


ALONE = Watch()


class EvaluationStopped(Exception):
    """It was asked to stop between two batches."""


def evaluate(
    model: Any, encoder: Encoder, samples: list[Sample], config: EvaluationConfig, ranks: Ranks,
    watch: Watch = ALONE,
) -> Evaluation:  # fmt: skip
    """Answer the last turn of each sample, greedily. Every rank answers its share; every rank gets the whole result.

    Args:
        watch: what is told and asked on the way.

    Raises:
        ConfigError: a metric is about objects, and no sample has any.
        EvaluationStopped: `watch.stops` said so.
    """
    mine = list(enumerate(samples))[ranks.rank :: ranks.world_size]
    metrics = {name: metric for name in config.metrics if (metric := find_metric(name)) is not None}
    _check_objects(metrics, samples)
    rows: list[tuple[int, dict[str, Any]]] = []
    refused: list[tuple[int, str]] = []
    share = -(-len(samples) // ranks.world_size)
    for start in range(0, share, config.batch_size):  # as often on every rank
        watch.tells(min(start * ranks.world_size, len(samples)), len(samples))
        if watch.stops():
            raise EvaluationStopped
        asked = []
        for number, sample in mine[start : start + config.batch_size]:
            try:
                asked.append((number, sample, _prompt(encoder, sample)))
            except BadSample as reason:
                refused.append((number, str(reason)))
        prompts = [prompt for _, _, prompt in asked]
        together = ranks.world_size > 1
        if together and (blank := encoder.lacking(prompts)) is not None:
            prompts.append(blank)  # each rank runs every part of the model as often as the others
        if prompts:
            inputs = collate(prompts, encoder.processor.tokenizer.pad_token_id, side="left")
            options = {"synced_gpus": True} if together else {}
            answers = generate(model, encoder.processor, inputs, config.max_new_tokens, watch.cut, **options)
            said = zip(asked, answers[: len(asked)], strict=True)
            rows += [(number, _row(encoder, sample, answer, metrics)) for (number, sample, _), answer in said]
    if watch.stops():  # the last answers may be cut short
        raise EvaluationStopped
    parts = ranks.gather((rows, refused))
    ordered = sorted((one for part, _ in parts for one in part), key=lambda one: one[0])
    problems = sorted(one for _, part in parts for one in part)
    return Evaluation(
        [row for _, row in ordered],
        list(config.metrics),
        [(samples[number].shard, samples[number].key, reason) for number, reason in problems],
        [number for number, _ in ordered],
    )


def _prompt(encoder: Encoder, sample: Sample) -> Encoded:
    """A sample's question, as it stands before the answer in training."""
    question = question_of(sample)
    if not question:
        raise BadSample("no question stands before the answer")
    if not right_answers(sample):
        raise BadSample("the last turn has no words to compare with: a thought or a tool call alone")
    thinks = has_reasoning(sample.messages[len(question)])
    question = encoder.placing.written(sample.messages, sample.objects, sample.sizes)[: len(question)]
    return encoder.encode_prompt(question, sample.images, sample.key, tools=sample.tools, reasoning=thinks, videos=sample.videos)


def _check_objects(metrics: dict[str, Metric], samples: list[Sample]) -> None:
    asking = next((name for name, metric in metrics.items() if is_about_objects(metric)), None)
    if asking is not None and samples and not any(sample.objects for sample in samples):
        raise ConfigError(f"evaluation.metrics: {asking}: none of the {len(samples)} held-out samples has objects; leave it out")


def check_metrics(config: Config) -> None:
    """Before anything is loaded.

    Raises:
        ConfigError: there is no such metric, or the one that decides is not computed.
    """
    for name in config.evaluation.metrics:
        find_metric(name)
    best = config.checkpoint.best_metric
    if best not in ("exact_match", *config.evaluation.metrics):
        raise ConfigError(f"checkpoint.best_metric: '{best}' is not computed; add it to evaluation.metrics")
    if config.evaluation.patience and not (config.evaluation.every and config.data.heldout):
        raise ConfigError("evaluation.patience: nothing is evaluated during training; set evaluation.every and data.heldout")


@dataclass
class Patience:
    """Early stopping: how many evaluations ago a score was at its best."""

    limit: int | None
    metric: str
    best: float | None = None
    since: int = 0

    @property
    def is_over(self) -> bool:
        return self.limit is not None and self.since >= self.limit

    def see(self, scores: dict[str, Any]) -> None:
        """One more evaluation."""
        score = scores[self.metric] * (-1 if self.metric in LOWER_IS_BETTER else 1)
        if self.best is None or score > self.best:
            self.best, self.since = score, 0
        else:
            self.since += 1

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "since": self.since}

    def restore(self, state: dict[str, Any]) -> None:
        self.best, self.since = state["best"], state["since"]


def question_of(sample: Sample) -> list[dict[str, Any]]:
    """The conversation up to its last assistant turn."""
    last = max(number for number, message in enumerate(sample.messages) if message["role"] == "assistant")
    return sample.messages[:last]


def right_answers(sample: Sample) -> list[str]:
    """What the last turn says, and what the sample's `captions` or `answers` say besides."""
    truth = without_thought(_text(sample.messages[len(question_of(sample))]))
    others = [text for name in ("captions", "answers", "answer") for text in texts_of(sample.meta.get(name))]
    return others if truth in others or not truth else [truth, *others]


def _row(encoder: Encoder, given: Sample, answer: str, metrics: dict[str, Metric]) -> dict[str, Any]:
    sample = replace(given, messages=encoder.placing.written(given.messages, given.objects, given.sizes))
    question, truths = question_of(sample), right_answers(sample)
    truth = without_thought(_text(sample.messages[len(question)]))
    answer = without_generated_thought(answer, truth)
    if given.objects:
        truths = [encoder.placing.as_generated(truth) for truth in truths]
    marks = _marks(encoder, given, answer)
    values = {name: value_of(metric, answer, truths, marks) for name, metric in metrics.items()}
    return {
        "key": sample.key,
        "task": sample.meta.get("task", ""),
        "kind": sample.meta.get("kind", "") or sample.meta.get("task", ""),
        "prompt": _text(question[-1]) if question else "",
        **({"earlier": [{"role": turn["role"], "text": _text(turn)} for turn in question[:-1]]} if question[1:] else {}),
        "answer": answer,
        "truth": truth,
        "truths": truths,
        "exact": bool(exact_match(answer, truths)),
        "metrics": {name: value for name, value in values.items() if value is not None},
        **_shown(marks),
    }


def _marks(encoder: Encoder, sample: Sample, answer: str) -> Marks:
    """Of a sample as it was read, its placeholders in place."""
    truth = objects_answered(sample.messages, sample.objects) if sample.objects else []
    answered = encoder.placing.read(answer, sample.sizes, [one.image for one in truth]) if truth else []
    return Marks(answered, truth, sample.sizes)


def _shown(marks: Marks) -> dict[str, Any]:
    """For the report: what lies in the first picture, in its pixels."""
    if not marks.truth:
        return {}
    parts = {name: [one.to_dict() for one in part if not one.image] for name, part in (("truth", marks.truth), ("answer", marks.answered))}
    return {"objects": {"size": list(marks.sizes[0]), **parts}}


def _text(message: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def _share(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 6) if hits else 0.0
