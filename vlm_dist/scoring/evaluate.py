"""Generated answers to held-out questions, compared with the truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vlm_dist.config import Config, EvaluationConfig
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.distributed import Ranks
from vlm_dist.errors import ConfigError
from vlm_dist.models.generate import generate
from vlm_dist.scoring.metrics import LOWER_IS_BETTER, WHOLE_SET, Metric, exact_match, find_metric, of_whole_set


@dataclass
class Evaluation:
    """Scores, and one row a sample: key, task, kind, prompt, answer, truth, exact."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    """Those asked for besides exact_match."""

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
        }

    def _score(self, name: str) -> float:
        if not self.rows:
            return 0.0
        if name in WHOLE_SET:
            return round(of_whole_set(name, [row["answer"] for row in self.rows], [row["truths"] for row in self.rows]), 6)
        return round(sum(row["metrics"][name] for row in self.rows) / len(self.rows), 6)


def evaluate(
    model: Any, encoder: Encoder, samples: list[Sample], config: EvaluationConfig, ranks: Ranks, beat: Callable[[], object] = lambda: None
) -> Evaluation:
    """Answer the last turn of each sample, greedily. Every rank answers its share, and calls `beat` before each batch; every rank gets
    the whole result."""
    mine = samples[ranks.rank :: ranks.world_size]
    metrics = {name: metric for name in config.metrics if (metric := find_metric(name)) is not None}
    rows = []
    for start in range(0, len(mine), config.batch_size):
        beat()
        batch = mine[start : start + config.batch_size]
        prompts = [encoder.encode_prompt(question_of(sample), sample.images, sample.key) for sample in batch]
        inputs = collate(prompts, encoder.processor.tokenizer.pad_token_id, side="left")
        answers = generate(model, encoder.processor, inputs, config.max_new_tokens)
        rows += [_row(sample, answer, metrics) for sample, answer in zip(batch, answers, strict=True)]
    gathered = [row for part in ranks.gather(rows) for row in part]
    order = {sample.key: number for number, sample in enumerate(samples)}
    return Evaluation(sorted(gathered, key=lambda row: order[row["key"]]), list(config.metrics))


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
    truth = _text(sample.messages[len(question_of(sample))])
    others = [text for name in ("captions", "answers") for text in sample.meta.get(name) or () if isinstance(text, str)]
    return others if truth in others else [truth, *others]


def _row(sample: Sample, answer: str, metrics: dict[str, Metric]) -> dict[str, Any]:
    question, truths = question_of(sample), right_answers(sample)
    return {
        "key": sample.key,
        "task": sample.meta.get("task", ""),
        "kind": sample.meta.get("kind", "") or sample.meta.get("task", ""),
        "prompt": _text(question[-1]) if question else "",
        "answer": answer,
        "truth": _text(sample.messages[len(question)]),
        "truths": truths,
        "exact": bool(exact_match(answer, truths)),
        "metrics": {name: float(metric(answer, truths)) for name, metric in metrics.items()},
    }


def _text(message: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def _share(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 6) if hits else 0.0
