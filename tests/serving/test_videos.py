"""A model in use is shown videos: `vlm-dist generate --video`, and clips in `vlm-dist chat`, on its page too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.browser import browser, errors_of
from tests.serving.test_chat import free_port
from tests.videos import clip, picture, sound
from vlm_dist.cli.main import main
from vlm_dist.config_model import VideoConfig
from vlm_dist.data.video import open_clip
from vlm_dist.serving.answer import answer
from vlm_dist.serving.chat import Chat
from vlm_dist.serving.chat_page import _answer_of, serve_page

ASKED = "Where does it go?"


@pytest.fixture(scope="module")
def qwen(checkpoint) -> str:
    return str(checkpoint("qwen2_5_vl"))


@pytest.fixture
def moving(tmp_path) -> Path:
    (tmp_path / "moving.mp4").write_bytes(clip(frames=25))
    return tmp_path / "moving.mp4"


def test_generate_shows_a_video(qwen, llava, moving, tmp_path, capsys):
    command = ["generate", qwen, "--prompt", ASKED, "--max-new-tokens", "6", "--json"]
    assert main([*command, "--video", str(moving)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["videos"] == [str(moving)] and found["images"] == []
    (tmp_path / "other.gif").write_bytes(clip("gif", frames=15, pixels=lambda number, size: 255 - picture(number, size)))
    assert main([*command, "--video", str(moving), "--video", str(tmp_path / "other.gif")]) == 0
    both = json.loads(capsys.readouterr().out)
    assert len(both["videos"]) == 2 and both["answer"] != found["answer"]  # it is looked at
    (tmp_path / "sound.mp4").write_bytes(sound())
    for options, code, words in (
        ([*command, "--video", str(tmp_path / "sound.mp4")], 3, "it has no pictures, only sound; give an mp4"),
        ([*command, "--video", str(tmp_path / "gone.mp4")], 3, "--video: '" + str(tmp_path / "gone.mp4") + "' cannot be read"),
        ([*command, "--video", str(moving), "--folder", str(tmp_path)], 2, "--video and --folder are given"),
        (["generate", llava, "--prompt", ASKED, "--video", str(moving)], 3, "a video, and llava takes none"),
    ):
        assert main(options) == code
        assert words in capsys.readouterr().err


def test_chat_remembers_a_video(qwen, moving):
    chat = Chat(qwen, max_new_tokens=6)
    chat.show(moving)
    assert "".join(chat.ask(ASKED)).strip() == answer(qwen, [], ASKED, max_new_tokens=6, videos=[moving])
    seen = []
    watched = chat.model.model.visual.register_forward_pre_hook(lambda _, given: seen.append(1))
    list(chat.ask("And then?"))
    watched.remove()
    shown = open_clip(moving.read_bytes(), "m", 10**6).shown(VideoConfig())
    assert seen and len(chat.videos) == 1 and len(chat.videos[0].frames) == len(shown.frames)  # looked at again
    chat.forget()
    assert not chat.videos


def test_the_handler_tells_what_cannot_be_shown(qwen, llava, moving, tmp_path):
    settings = {"compare": False, "temperature": 0.0, "top_p": 1.0, "longest": 6}
    (tmp_path / "sound.mp4").write_bytes(sound())
    for model, path, words in (
        (qwen, tmp_path / "sound.mp4", "it has no pictures, only sound"),
        (llava, moving, "a video, and llava takes none"),
    ):
        *_, (told, _, _, session) = _answer_of(Chat(model))({"text": ASKED, "files": [str(path)]}, [], [], None, **settings)
        assert words in told[-1]["content"] and not session.messages


@pytest.mark.slow
@pytest.mark.browser
def test_a_clip_is_uploaded_in_a_browser(qwen, moving):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    page = serve_page(Chat(qwen, max_new_tokens=6), "moving", host="127.0.0.1", port=free_port())
    try:
        with browser(900) as driver:
            driver.get(f"http://127.0.0.1:{page.server_port}/")
            wait = WebDriverWait(driver, 60)
            question = wait.until(lambda one: one.find_elements(By.ID, "question"))[0]
            wait.until(lambda one: question.find_elements(By.CSS_SELECTOR, "input[type=file]"))[0].send_keys(str(moving))
            wait.until(lambda one: question.find_elements(By.CSS_SELECTOR, ".thumbnail-item"))
            question.find_element(By.TAG_NAME, "textarea").send_keys(ASKED, Keys.ENTER)
            wait.until(lambda one: one.find_elements(By.CSS_SELECTOR, "#trained .bot .message, #trained .bot.message"))
            wait.until(lambda one: not one.find_elements(By.CSS_SELECTOR, ".generating, .pending"))
            shown = " ".join(driver.find_element(By.ID, "trained").text.split())
            assert ASKED in shown and answer(qwen, [], ASKED, max_new_tokens=6, videos=[moving]) in shown
            assert wait.until(lambda one: one.find_elements(By.CSS_SELECTOR, "#trained video"))
            assert [error for error in errors_of(driver) if "127.0.0.1" in error] == []
    finally:
        page.close()
