"""Generated answers to held-out questions, compared with the truth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vlm_dist.config import EvaluationConfig
from vlm_dist.data.collate import collate
from vlm_dist.data.encode import Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.distributed import Ranks
from vlm_dist.models.generate import generate


@dataclass
class Evaluation:
    """Scores, and one row a sample: key, task, kind, prompt, answer, truth, exact."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, Any]:
        """exact_match over all, the number of samples, and exact_match by kind of question where samples name one."""
        by_kind = defaultdict(list)
        for row in self.rows:
            if row["kind"]:
                by_kind[row["kind"]].append(row["exact"])
        return {
            "exact_match": _share([row["exact"] for row in self.rows]),
            "samples": len(self.rows),
            "by_kind": {kind: _share(hits) for kind, hits in sorted(by_kind.items())},
        }


def evaluate(
    model: Any, encoder: Encoder, samples: list[Sample], config: EvaluationConfig, ranks: Ranks, beat: Callable[[], object] = lambda: None
) -> Evaluation:
    """Answer the last turn of each sample, greedily. Every rank answers its share, and calls `beat` before each batch; every rank gets
    the whole result."""
    mine = samples[ranks.rank :: ranks.world_size]
    rows = []
    for start in range(0, len(mine), config.batch_size):
        beat()
        batch = mine[start : start + config.batch_size]
        prompts = [encoder.encode_prompt(question_of(sample), sample.images, sample.key) for sample in batch]
        inputs = collate(prompts, encoder.processor.tokenizer.pad_token_id, side="left")
        answers = generate(model, encoder.processor, inputs, config.max_new_tokens)
        rows += [_row(sample, answer) for sample, answer in zip(batch, answers, strict=True)]
    gathered = [row for part in ranks.gather(rows) for row in part]
    order = {sample.key: number for number, sample in enumerate(samples)}
    return Evaluation(sorted(gathered, key=lambda row: order[row["key"]]))


def same_answer(answer: str, truth: str) -> bool:
    """Exact match: equal but for case, outer and repeated white space, and a full stop at the end."""
    return _normal(answer) == _normal(truth)


def question_of(sample: Sample) -> list[dict[str, Any]]:
    """The conversation up to its last assistant turn."""
    last = max(number for number, message in enumerate(sample.messages) if message["role"] == "assistant")
    return sample.messages[:last]


def _row(sample: Sample, answer: str) -> dict[str, Any]:
    question = question_of(sample)
    truth = _text(sample.messages[len(question)])
    return {
        "key": sample.key,
        "task": sample.meta.get("task", ""),
        "kind": sample.meta.get("kind", "") or sample.meta.get("task", ""),
        "prompt": _text(question[-1]) if question else "",
        "answer": answer,
        "truth": truth,
        "exact": any(same_answer(answer, right) for right in (truth, *sample.meta.get("captions", ()))),
    }


def _text(message: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".").rstrip()


def _share(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 6) if hits else 0.0
