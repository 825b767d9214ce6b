"""The system prompt of the training: noticed while it trains, kept with the result, and said again when that is asked."""

from __future__ import annotations

import copy
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.data.samples import Sample
from vlm_dist.errors import ModelError
from vlm_dist.inputs.prompts import SystemPrompts, only_one
from vlm_dist.models.trained import system_prompt_of
from vlm_dist.serving.chat import Chat
from vlm_dist.serving.chat_page import _answer_of
from vlm_dist.serving.trained import open_trained

pytestmark = pytest.mark.slow
SYSTEM = "You look at shapes."
QUESTION = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]


def with_system(source: str, out: Path, prompts: list[str | None]) -> str:
    """The samples of a shard, each with one of the prompts in front, in turn."""
    with tarfile.open(source) as old, tarfile.open(out, "w") as new:
        number = 0
        for member in old:
            content = old.extractfile(member).read()
            if member.name.endswith(".json"):
                record, prompt = json.loads(content), prompts[number % len(prompts)]
                first = [{"role": "system", "content": prompt}] if prompt else []
                content = json.dumps({**record, "messages": [*first, *record["messages"]]}).encode()
                member.size, number = len(content), number + 1
            new.addfile(member, io.BytesIO(content))
    return str(out)


def trained(folder: Path, llava: str, shard: str, *overrides: str) -> str:
    settings = {
        "name": "system", "output_dir": str(folder), "model": {"name": llava, "dtype": "float32"}, "lora": {"r": 4},
        "data": {"train": shard, "max_seq_length": 256, "workers": 1}, "training": {"steps": 2, "global_batch": 4}, "optim": {"lr": 0.02},
        "checkpoint": {"save_every": 1}, "log": {"wandb": "disabled"},
    }  # fmt: skip
    train(load_config(write_config(settings, folder), overrides))
    return str(folder / "system")


@pytest.fixture(scope="module")
def run(tmp_path_factory, llava, shards) -> str:
    folder = tmp_path_factory.mktemp("system")
    return trained(folder, llava, with_system(shards["qa-train"][0], folder / "x.tar", [SYSTEM]))


def prompt_of(opened) -> str:
    return opened.processor.tokenizer.decode(opened.encode(QUESTION, []).inputs["input_ids"][0])


def test_what_was_trained_with_is_said_again(run, tmp_path, capsys):
    record = json.loads((Path(run) / "adapter" / "vlm_dist.json").read_text())
    assert record["system_prompt"] == SYSTEM
    assert open_trained(run).system == open_trained(f"{run}/adapter").system == SYSTEM
    assert SYSTEM in prompt_of(open_trained(run)) and SYSTEM not in prompt_of(open_trained(run, system=""))
    assert "Be brief." in prompt_of(open_trained(run, system="Be brief."))
    asked = ["generate", run, "--prompt", "What?", "--max-new-tokens", "8"]
    answers = []
    for more in ([], ["--system", SYSTEM], ["--system", ""], ["--base"]):
        assert main([*asked, *more]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(set(answers)) == 3
    assert main(["export", run, "--to", "merged-16bit", "--samples", "1", "--out", str(tmp_path / "merged")]) == 0
    assert open_trained(str(tmp_path / "merged")).system == SYSTEM


def test_in_a_conversation(run, monkeypatch, capsys):
    chat = Chat(run, max_new_tokens=8)
    first = "".join(chat.ask("What?"))
    assert chat.system == SYSTEM and [message["role"] for message in chat.messages] == ["user", "assistant"]
    other = chat.another()
    other.system = ""
    assert "".join(other.ask("What?")) != first and chat.system == SYSTEM
    chat.forget()
    assert "".join(chat.ask("What?")) == first
    handler, settings = _answer_of(chat), {"compare": False, "temperature": 0.0, "top_p": 1.0, "longest": 8}
    said = [list(handler({"text": "What?", "files": []}, [], [], None, **settings, **more))[-1][0][-1]["content"]
            for more in ({}, {"system": SYSTEM}, {"system": ""})]  # fmt: skip
    assert said[0] == said[1] == first.strip() != said[2]
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n"))
    assert main(["chat", run, "--terminal", "--system", "", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip() == said[2]


@pytest.mark.parametrize("prompts", [[SYSTEM, "Another."], [SYSTEM, None], [None]], ids=["two", "some", "none"])
def test_several_are_none(llava, shards, tmp_path, prompts):
    run = trained(tmp_path, llava, with_system(shards["qa-train"][0], tmp_path / "x.tar", prompts))
    assert system_prompt_of(run) is None and open_trained(run).system == ""


def test_earlier_starts_count(run):
    """A run that saw another prompt before it was interrupted has no single one; each checkpoint holds what was seen."""
    state = json.loads((Path(run) / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["prompts"] == [SYSTEM]
    prompts = SystemPrompts()
    prompts.note(Sample("one", "", [{"role": "system", "content": [{"type": "text", "text": "Another."}]}, *QUESTION], []))
    assert only_one(prompts.found) == "Another."
    prompts.restore(state["prompts"])
    assert only_one(prompts.found) is None and copy.deepcopy(prompts) is prompts


def test_a_template_without_one(llava, tmp_path):
    """Said in one line, where the prompt was asked for; a template that leaves it out would leave it out in silence."""
    for text, reason in (
        ("{{ raise_exception('System role not supported') }}", "refuses a system prompt"),
        ("", "leaves a system prompt out"),
    ):
        folder = Path(shutil.copytree(llava, tmp_path / reason.replace(" ", "-")))
        path = folder / "chat_template.jinja"
        rest = path.read_text()
        path.write_text("{% if messages[0].role == 'system' %}" + text + "{% set messages = messages[1:] %}{% endif %}" + rest)
        with pytest.raises(ModelError, match=f"--system: the chat template of .* {reason}"):
            open_trained(str(folder), system="Be brief.")
        assert open_trained(str(folder)).system == ""
