"""`vlm-dist chat`: the words of `vlm-dist generate`, piece by piece, with a memory."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.training import chat as chatting
from vlm_dist.training.answer import answer
from vlm_dist.training.chat import Chat

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards, llava) -> str:
    folder = tmp_path_factory.mktemp("chat")
    settings = {
        "name": "talk", "output_dir": str(folder), "model": {"name": llava, "dtype": "float32"}, "data": {"train": shards["qa-train"]},
        "training": {"steps": 4, "global_batch": 4}, "optim": {"lr": 0.02}, "log": {"wandb": "disabled"},
    }  # fmt: skip
    return train(load_config(write_config(settings, folder)))["result"].removesuffix("/adapter")


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_the_words_of_generate_and_of_the_base(trained, picture):
    chat = Chat(trained, max_new_tokens=8)
    chat.show(picture)
    pieces = list(chat.ask("What colour?"))
    assert "".join(pieces).strip() == answer(trained, [picture], "What colour?", max_new_tokens=8)
    base = "".join(chat.of_base()).strip()
    assert base == answer(trained, [picture], "What colour?", max_new_tokens=8, base=True)
    assert chat.has_adapter and len(chat.messages) == 2 and len(chat.pictures) == 1


def test_it_remembers_until_told_to_forget(trained, picture):
    chat = Chat(trained, max_new_tokens=6)
    chat.show(picture)
    list(chat.ask("What colour?"))
    again = "".join(chat.ask("And where?"))
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2 and len(chat.pictures) == 1
    chat.forget()
    assert not chat.messages and not chat.pictures
    alone = "".join(chat.ask("And where?")).strip()
    assert len(chat.messages) == 2 and alone == answer(trained, [], "And where?", max_new_tokens=6)
    assert isinstance(again, str)


def test_a_failed_answer_is_not_remembered(trained, monkeypatch):
    chat = Chat(trained, max_new_tokens=4)
    with monkeypatch.context() as broken:
        broken.setattr(chatting, "generate", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("CUDA error")))
        with pytest.raises(RuntimeError, match="CUDA error"):
            list(chat.ask("What colour?"))
    assert not chat.messages
    assert isinstance("".join(chat.ask("What colour?")), str) and len(chat.messages) == 2


def test_in_the_terminal(trained, picture, monkeypatch, capsys):
    lines = f"/image nowhere.jpg\n/image {picture}\nWhat colour?\n/compare\nWhere?\n/forget\n/what\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat", trained, "--max-new-tokens", "5"]) == 0
    shown = capsys.readouterr().out
    assert "'nowhere.jpg' cannot be read" in shown and shown.count("\nbase: ") == 1 and "/quit         or Ctrl-D" in shown


def test_wrong_settings(llava, capsys, monkeypatch):
    assert main(["chat", llava, "--top-p", "0"]) == 2
    assert "--top-p between 0 and 1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["chat", llava, "--compare"]) == 2
    assert "has no adapter" in capsys.readouterr().err
