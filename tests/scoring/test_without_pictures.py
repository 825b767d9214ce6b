"""How much of a score needs eyes: the same questions with the pictures greyed out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import write_config
from vlm_dist import distributed, load_config, train
from vlm_dist.cli.main import main
from vlm_dist.config import DataConfig, EvaluationConfig
from vlm_dist.data.encode import Encoder
from vlm_dist.data.samples import Sample
from vlm_dist.models.processor import load_processor
from vlm_dist.scoring import evaluate as evaluating
from vlm_dist.scoring.without_pictures import evaluate_whole, greyed


def ask(number: int, colour: str | None) -> Sample:
    content = [*([{"type": "image"}] if colour else []), {"type": "text", "text": "What colour?"}]
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "Which?"}]},
        {"role": "user", "content": [{"type": "text", "text": "The picture."}]},
        {"role": "assistant", "content": [{"type": "text", "text": colour or "none"}]},
    ]
    return Sample(f"k{number}", "s.tar", turns, [Image.new("RGB", (30, 20), colour)] if colour else [])


def test_pictures_that_show_nothing():
    sample = ask(0, "red")
    (grey,) = greyed(sample).images
    assert grey.size == (30, 20) and grey.getcolors() == [(600, (128, 128, 128))]
    (tensor,) = greyed(replace(sample, images=[torch.zeros(3, 20, 30, dtype=torch.uint8)])).images
    assert tensor.shape == (3, 20, 30) and tensor.dtype == torch.uint8 and (tensor == 128).all()


def test_what_needs_eyes(llava, monkeypatch):
    """A model that sees colours and guesses red where it sees none: what it guesses right needs no eyes."""
    from vlm_dist.config import ModelConfig

    processor = load_processor(ModelConfig(name=llava), llava)
    seen: list[int] = []

    def colours(model, processor, batch, max_new_tokens, stops=None, **options):
        """The mean red, green and blue of each picture decide."""
        words, pictures = [], batch.get("pixel_values")
        seen.append(0 if pictures is None else len(pictures))
        for picture in pictures if pictures is not None else []:
            red, _, blue = (float(channel.mean()) for channel in picture)
            words.append("blue" if blue > red + 1 else "red")
        return words + ["none"] * (len(batch["input_ids"]) - len(words))

    monkeypatch.setattr(evaluating, "generate", colours)
    samples = [ask(0, "red"), ask(1, "blue"), ask(2, "blue"), ask(3, None)]
    encoder, config = Encoder.of(processor, DataConfig(train=["x"])), EvaluationConfig(metrics=["token_f1"], batch_size=4)
    found = evaluate_whole(None, encoder, samples, config, distributed.alone())
    assert found.scores["exact_match"] == 1.0 and seen == [3, 3]
    assert found.scores["without_pictures"] == {
        "samples": 3, "exact_match": pytest.approx(1 / 3, abs=1e-5), "token_f1": pytest.approx(1 / 3, abs=1e-5),
        "with_pictures": {"exact_match": 1.0, "token_f1": 1.0}, "needs_eyes": pytest.approx(2 / 3, abs=1e-5),
    }  # fmt: skip
    assert found.rows[1]["without_picture"] == {"answer": "red", "exact": False} and "without_picture" not in found.rows[3]
    assert [turn["text"] for turn in found.rows[0]["earlier"]] == ["What colour?", "Which?"]
    without = evaluate_whole(None, encoder, samples, config.model_copy(update={"without_pictures": False}), distributed.alone())
    assert "without_pictures" not in without.scores
    assert "without_pictures" not in evaluate_whole(None, encoder, samples[3:], config, distributed.alone()).scores


def test_a_run_has_it(settings, tmp_path, capsys):
    """After training, in summary, answers and card; `eval` says it too, and can be told not to."""
    summary = train(load_config(write_config(settings, tmp_path)))
    blind = summary["eval"]["after"]["without_pictures"]
    assert blind["samples"] == 4 and set(blind) == {"samples", "exact_match", "with_pictures", "needs_eyes"}
    assert "without_pictures" not in summary["eval"]["before"]
    run = Path(settings["output_dir"]) / "tiny"
    rows = [json.loads(line) for line in (run / "samples" / "after.jsonl").read_text().splitlines()]
    assert all(set(row["without_picture"]) == {"answer", "exact"} for row in rows)
    assert "with the pictures greyed out" in (run / "logs" / "rank-0.log").read_text()
    capsys.readouterr()
    assert main(["eval", str(run), "--samples", "2"]) == 0 and "greyed out" in capsys.readouterr().out
    assert main(["eval", str(run), "--samples", "2", "--no-without-pictures"]) == 0 and "greyed out" not in capsys.readouterr().out
