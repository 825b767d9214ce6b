"""An evaluation that is told to stop stops at the next token, and says meanwhile how far it is."""

from __future__ import annotations

import logging

import pytest

from tests.conftest import write_config
from vlm_dist import distributed, load_config
from vlm_dist.config import DataConfig, EvaluationConfig, ModelConfig
from vlm_dist.data.encode import Encoder
from vlm_dist.data.heldout import read_heldout
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.models.load import load_model
from vlm_dist.run_dir import RunDir
from vlm_dist.scoring.evaluate import EvaluationStopped, Watch, evaluate
from vlm_dist.training.log import Log


def test_it_stops_within_an_answer(llava, shards, tmp_path):
    """Not after the batch, which may take a minute."""
    model, processor, _ = load_model(ModelConfig(name=llava, load_in_4bit=False), llava, distributed.alone().device)
    data = DataConfig(train=shards["qa-train"], heldout=shards["qa-heldout"])
    heldout = read_heldout(data, 6, Quarantine(tmp_path / "q", 1.0))
    model.generation_config.eos_token_id = None  # it never ends by itself
    tokens, told = [], []

    def cut() -> bool:
        tokens.append(1)
        return len(tokens) >= 3

    watch = Watch(lambda done, total: told.append((done, total)), lambda: len(tokens) >= 3, cut)
    config = EvaluationConfig(batch_size=4, max_new_tokens=200)
    with pytest.raises(EvaluationStopped):
        evaluate(model, Encoder.of(processor, data), heldout, config, distributed.alone(), watch)
    assert len(tokens) == 3 and told == [(0, 6), (4, 6)]


def test_how_far_it_is_stands_in_the_log(settings, tmp_path, monkeypatch, caplog):
    """A line after two seconds, then every ten."""
    config = load_config(write_config(settings, tmp_path))
    clock = iter([100.0, 101.0, 103.0, 104.0, 114.0, 115.0])
    with Log(RunDir(tmp_path / "run"), config, distributed.alone(), 4) as log, caplog.at_level(logging.INFO):
        monkeypatch.setattr("vlm_dist.training.log.time.monotonic", lambda: next(clock))
        for done in (0, 8, 16, 24, 32, 40):
            log.progress("evaluating before training", done, 48)
    assert [record.message for record in caplog.records] == [
        "evaluating before training: 16 of 48 samples  0:06 left",
        "evaluating before training: 32 of 48 samples  0:07 left",
    ]
