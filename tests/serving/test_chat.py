"""`vlm-dist chat`: the words of `vlm-dist generate`, piece by piece, with a memory."""

from __future__ import annotations

import io
import socket
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from tests.browser import browser, errors_of
from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.errors import MachineError
from vlm_dist.serving import chat as chatting
from vlm_dist.serving.answer import answer
from vlm_dist.serving.chat import Chat
from vlm_dist.serving.chat_page import _answer_of, serve_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards, llava) -> str:
    folder = tmp_path_factory.mktemp("chat")
    settings = {
        "name": "talk", "output_dir": str(folder), "model": {"name": llava, "dtype": "float32"}, "data": {"train": shards["qa-train"]},
        "training": {"steps": 4, "global_batch": 4}, "optim": {"lr": 0.02}, "log": {"wandb": "disabled"},
    }  # fmt: skip
    return train(load_config(write_config(settings, folder)))["result"].removesuffix("/adapter")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    assert main(["chat", trained, "--terminal", "--max-new-tokens", "5"]) == 0
    shown = capsys.readouterr().out
    assert "'nowhere.jpg' cannot be read" in shown and shown.count("\nbase: ") == 1 and "/quit         or Ctrl-D" in shown


def test_an_abandoned_answer_ends(trained, picture):
    """Leaving it stops the generation, instead of waiting for the longest answer."""
    chat = Chat(trained, max_new_tokens=2000)
    chat.options = {"min_new_tokens": 1999}
    pieces = chat.ask("What colour?")
    next(pieces)
    steps = []
    hook = chat.model.register_forward_hook(lambda *_: steps.append(1))
    pieces.close()
    hook.remove()
    assert not chat.messages and not [thread for thread in threading.enumerate() if thread.name == "generate"]
    assert len(steps) < 1000, "of 2,000 tokens, at most those that came before it was told"


def test_the_handler_of_the_page(trained, picture, tmp_path):
    """Each visitor has a conversation; a file that is no picture is told; nothing is asked without words."""
    handler = _answer_of(Chat(trained, max_new_tokens=256))
    settings = {"compare": True, "temperature": 0.0, "top_p": 1.0, "longest": 8}
    *_, (ours, base, cleared, session) = handler({"text": "What colour?", "files": [str(picture)]}, [], [], None, **settings)
    assert ours[-1]["content"] == answer(trained, [picture], "What colour?", max_new_tokens=8) and cleared == {"text": "", "files": []}
    assert base[-1]["content"] == answer(trained, [picture], "What colour?", max_new_tokens=8, base=True)
    *_, (more, _, _, same) = handler({"text": "And where?", "files": []}, ours, base, session, **{**settings, "compare": False})
    assert len(more) == len(ours) + 2 and same is session and len(session.messages) == 4
    (tmp_path / "no.png").write_text("no picture")
    *_, (told, _, _, other) = handler({"text": "What?", "files": [str(tmp_path / "no.png")]}, [], [], None, **settings)
    assert "no picture that is known here" in told[-1]["content"] and other is not session and not other.messages
    *_, (nothing, *_) = handler({"text": " ", "files": [str(picture)]}, [], [], other, **settings)
    assert nothing == [] and not other.messages


@pytest.mark.browser
def test_the_page_in_a_browser(trained, picture):
    """A picture is uploaded, a question typed, both answers appear; phone width too."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    chat = Chat(trained, max_new_tokens=6)
    page = serve_page(chat, "talk", host="127.0.0.1", port=free_port())
    try:
        with browser(390, dark=True) as driver:
            driver.get(f"http://127.0.0.1:{page.server_port}/")
            wait = WebDriverWait(driver, 60)
            wait.until(lambda one: one.find_elements(By.CSS_SELECTOR, "#compare input"))[0].click()
            wait.until(lambda one: one.find_element(By.ID, "base").is_displayed())
            question = driver.find_element(By.ID, "question")
            question.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(picture))
            wait.until(lambda one: question.find_elements(By.TAG_NAME, "img"))
            box = question.find_element(By.TAG_NAME, "textarea")
            box.send_keys("What colour?", Keys.ENTER)
            wait.until(lambda one: len(one.find_elements(By.CSS_SELECTOR, "#base .bot .message, #base .bot.message")) > 0)
            wait.until(lambda one: not one.find_elements(By.CSS_SELECTOR, ".generating, .pending"))
            shown = driver.find_element(By.ID, "trained").text
            assert "What colour?" in shown and answer(trained, [picture], "What colour?", max_new_tokens=6) in " ".join(shown.split())
            assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
            shares = driver.find_elements(By.CSS_SELECTOR, "button[title=Share], button[aria-label=Share]")
            assert shares and not any(button.is_displayed() for button in shares)
            assert [error for error in errors_of(driver) if "127.0.0.1" in error] == []
        with browser(1400) as driver:
            driver.get(f"http://127.0.0.1:{page.server_port}/")
            WebDriverWait(driver, 60).until(lambda one: one.find_elements(By.ID, "trained"))
            assert driver.find_element(By.ID, "trained").size["width"] > 1000
        with pytest.raises(MachineError, match="give another --port"):
            serve_page(chat, "talk", host="127.0.0.1", port=page.server_port)
    finally:
        page.close()


def test_a_fully_trained_model_has_its_start_for_a_base(tmp_path, shards, llava, picture):
    """Loaded when it is asked; another conversation shares it."""
    settings = {
        "name": "full", "output_dir": str(tmp_path), "model": {"name": llava, "dtype": "float32", "load_in_4bit": False}, "lora": None,
        "data": {"train": shards["qa-train"]}, "training": {"steps": 4, "global_batch": 4}, "optim": {"lr": 0.02},
        "log": {"wandb": "disabled"},
    }  # fmt: skip
    train(load_config(write_config(settings, tmp_path)))
    chat = Chat(str(tmp_path / "full"), max_new_tokens=6)
    assert chat.has_base and not chat.has_adapter
    chat.show(picture)
    said = "".join(chat.ask("What colour?")).strip()
    assert said == answer(str(tmp_path / "full"), [picture], "What colour?", max_new_tokens=6)
    assert "".join(chat.of_base()).strip() == answer(llava, [picture], "What colour?", max_new_tokens=6)
    assert chat.another()._base is chat._base and len(chat._base) == 1


def test_wrong_settings(llava, capsys, monkeypatch):
    assert main(["chat", llava, "--top-p", "0"]) == 2
    assert "--top-p between 0 and 1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["chat", llava, "--terminal", "--compare"]) == 2
    assert "has no adapter" in capsys.readouterr().err
