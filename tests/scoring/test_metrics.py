"""Metrics by their definitions, on worked examples; in a run, with early stopping and the best checkpoint by any of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.errors import ConfigError
from vlm_dist.scoring.evaluate import Evaluation
from vlm_dist.scoring.metrics import anls, cer, exact_match, find_metric, of_whole_set, relaxed_accuracy, token_f1, vqa_accuracy, wer
from vlm_dist.training import session as sessions


@pytest.mark.parametrize(
    ("metric", "answer", "truths", "expected"),
    [
        (exact_match, " Red. ", ["red"], 1),
        (exact_match, "red", ["blue", "RED"], 1),
        (exact_match, "redder", ["red"], 0),
        (token_f1, "the red cat", ["a red dog"], 0.5),
        (token_f1, "cat", ["dog", "a black cat"], 2 / 3),
        (token_f1, "", ["x"], 0),
        (anls, "hallo", ["hello"], 0.8),
        (anls, "abcd", ["hello"], 0),
        (vqa_accuracy, "red", ["red"] * 3 + ["blue"] * 7, 0.9),
        (vqa_accuracy, "red", ["red"] * 2 + ["blue"] * 8, 0.6),
        (vqa_accuracy, "red", ["red"] * 10, 1),
        (vqa_accuracy, "The red!", ["red"], 1),
        (relaxed_accuracy, "104", ["100"], 1),
        (relaxed_accuracy, "106", ["100"], 0),
        (relaxed_accuracy, "$1,020", ["1000"], 1),
        (relaxed_accuracy, "50%", ["0.5"], 1),
        (relaxed_accuracy, "Spain", ["spain"], 1),
        (cer, "hallo", ["hello"], 0.2),
        (cer, "hello", ["xxxxx", "hello"], 0),
        (wer, "a red cat", ["a blue cat"], 1 / 3),
        (wer, "x", [""], 1),
    ],
)
def test_by_definition(metric, answer, truths, expected):
    assert metric(answer, truths) == pytest.approx(expected)


def test_of_the_whole_set():
    answers, truths = ["the cat sat on the mat", "a dog"], [["the cat sat on the mat"], ["a dog", "one dog"]]
    assert of_whole_set("bleu", answers, truths) == pytest.approx(1) and of_whole_set("chrf", answers, truths) == pytest.approx(1)
    assert 0 < of_whole_set("bleu", ["the cat sat on a mat", "a dog"], truths) < 1
    rows = [{"exact": True, "kind": "", "answer": a, "truths": t, "metrics": {"wer": 0.5}} for a, t in zip(answers, truths, strict=True)]
    assert Evaluation(rows, ["wer", "chrf"]).scores == {"exact_match": 1.0, "wer": 0.5, "chrf": 1.0, "samples": 2, "by_kind": {}}


def first_letter(answer: str, truths: list[str]) -> float:
    return float(any(answer[:1] == truth[:1] for truth in truths))


def test_cider_of_its_authors():
    """Ten where every caption is the only right one; less for fewer common words; nothing in common: zero."""
    truths = [["A red circle on the left."], ["two blue squares, top right"], ["nothing but a green cross"]]
    right = [each[0].upper() for each in truths]
    assert of_whole_set("cider", right, truths) == pytest.approx(10)
    half = of_whole_set("cider", ["a red circle", *right[1:]], truths)
    assert 6 < half < 10
    assert of_whole_set("cider", ["x", "y", "z"], truths) == 0


def test_names():
    assert find_metric(f"{__name__}:first_letter") is not None and find_metric("bleu") is None
    for name, words in (
        ("rouge", "no metric 'rouge'; there are exact_match"),
        ("nothing:x", "No module named"),
        ("json:x", "has no attribute"),
    ):
        with pytest.raises(ConfigError, match=words):
            find_metric(name)


def test_in_a_run(settings, tmp_path):
    settings["evaluation"] = {"every": 2, "samples": 4, "max_new_tokens": 4}
    mine = f"{__name__}:first_letter"
    names = ["token_f1", "cer", "chrf", mine]
    options = [f"evaluation.metrics={json.dumps(names)}", "checkpoint.best_metric=cer", "checkpoint.keep_best=1"]
    summary = train(load_config(write_config(settings, tmp_path), options))
    assert set(names) <= set(summary["eval"]["after"])
    rows = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "samples" / "after.jsonl").read_text().splitlines()]
    assert all(set(row["metrics"]) == {"token_f1", "cer", mine} for row in rows)


def test_early_stopping(settings, tmp_path, monkeypatch):
    """The score falls from the second evaluation on: two more, and training ends as finished, with its adapter."""
    settings["training"]["steps"] = 20
    settings["evaluation"] = {"every": 2, "samples": 2, "max_new_tokens": 2, "patience": 2}
    scores, evaluate = iter([0.1, 0.2, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1]), sessions.evaluate

    def falling(*arguments):
        found = evaluate(*arguments)
        share = next(scores)
        monkeypatch.setattr(type(found), "scores", {"exact_match": share, "samples": 2, "by_kind": {}})
        return found

    monkeypatch.setattr(sessions, "evaluate", falling)
    summary = train(load_config(write_config(settings, tmp_path)))
    assert summary["ended"] == "finished" and summary["step"] == 8 and Path(summary["result"]).exists()
    events = (tmp_path / "runs" / "tiny" / "events.jsonl").read_text()
    assert "exact_match has not become better in 2 evaluations" in events


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("evaluation.metrics=[rouge]", "evaluation.metrics: no metric 'rouge'"),
        ("checkpoint.best_metric=anls", "'anls' is not computed; add it to evaluation.metrics"),
        ("evaluation.patience=2", "nothing is evaluated during training"),
    ],
)
def test_what_cannot_be(settings, tmp_path, capsys, option, words):
    assert main(["train", str(write_config(settings, tmp_path)), "--dry-run", option]) == 2
    assert words in capsys.readouterr().err
