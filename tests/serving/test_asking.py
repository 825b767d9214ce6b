"""`vlm-dist generate`: pictures from the web and from a folder, drawn words, and waits that say what they are."""

from __future__ import annotations

import functools
import http.server
import json
import threading
import time

import pytest
from PIL import Image

from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.data.fetch import Fetcher
from vlm_dist.errors import DataError
from vlm_dist.serving import answer as asking
from vlm_dist.serving.answer import open_picture
from vlm_dist.waiting import waiting


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (40, 30), "red" if name == "a.jpg" else "blue").save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def test_a_folder_gives_a_line_for_each_picture(llava, folder, tmp_path, capsys):
    command = ["generate", llava, "--prompt", "What colour?", "--max-new-tokens", "4"]
    assert main([*command, "--folder", str(folder)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["images"] for row in rows] == [[str(folder / "a.jpg")], [str(folder / "b.png")]]
    assert main([*command, "--image", str(folder / "b.png")]) == 0
    assert capsys.readouterr().out.strip() == rows[1]["answer"]
    assert main([*command, "--folder", str(folder), "--image", "x.png"]) == 2
    assert main([*command, "--folder", str(tmp_path / "nowhere")]) == 3
    (tmp_path / "empty").mkdir()
    assert main([*command, "--folder", str(tmp_path / "empty")]) == 3
    assert "holds no picture" in capsys.readouterr().err


def test_a_picture_that_is_none_stops_no_other(llava, folder, capsys):
    (folder / "aa.png").write_bytes((folder / "b.png").read_bytes()[:40])
    assert main(["generate", llava, "--prompt", "What colour?", "--max-new-tokens", "4", "--folder", str(folder)]) == 3
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert ["answer" in row for row in rows] == [True, False, True] and "aa.png" in rows[1]["error"] and "--image" not in rows[1]["error"]
    assert "--folder: 1 of 3 pictures cannot be read" in err


def test_words_are_drawn_by_seed(llava, folder, capsys):
    command = ["generate", llava, "--prompt", "What?", "--image", str(folder / "a.jpg"), "--max-new-tokens", "12"]

    def said(*options: str) -> str:
        assert main([*command, *options]) == 0
        return capsys.readouterr().out

    drawn = [said("--temperature", "3", "--seed", str(seed)) for seed in range(3)]
    assert len(set(drawn)) > 1 and drawn[1] == said("--temperature", "3", "--seed", "1")
    assert said("--temperature", "3", "--top-p", "0.0001") == said()  # only the likeliest is left
    odd = {"--temperature": "0", "--top-p": "2", "--seed": "99999999999999999999999", "--max-new-tokens": "0"}
    for options, words in [([option, value], f"{option}: found {value}") for option, value in odd.items()]:
        assert main([*command, *options]) == 2 and words in capsys.readouterr().err


def test_a_picture_at_an_address(folder, monkeypatch, capsys, llava):
    """Fetched as `data pack --fetch` does: bounded, and not from inside a network unless it is allowed."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert main(["generate", llava, "--prompt", "?", "--image", f"{address}/a.jpg"]) == 3
    assert "cannot be fetched" in capsys.readouterr().err
    monkeypatch.setattr(asking, "Fetcher", lambda: Fetcher(allow_private=True, attempts=1))
    assert open_picture(f"{address}/a.jpg").size == (40, 30)
    with pytest.raises(DataError, match=r"--image: .*(404|cannot be fetched)"):
        open_picture(f"{address}/nothing.jpg")
    server.shutdown()
    server.server_close()


def test_a_long_wait_says_what_it_is(monkeypatch, capsys):
    monkeypatch.setattr("vlm_dist.waiting.FIRST_S", 0.05)
    with waiting("loading"):
        time.sleep(0.3)
        with waiting("loading its weights"):
            time.sleep(0.3)
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == ["loading ...", "loading its weights ..."] and told[-1] == "loading: 1 s"
    with waiting("nothing long"):
        pass
    assert capsys.readouterr().err == ""


def test_files_have_one_mode(settings, tmp_path):
    """Weights may be read by whoever may read what lies beside them."""
    settings["data"]["heldout"] = []
    train(load_config(write_config(settings, tmp_path)))
    run = tmp_path / "runs" / "tiny"
    modes = {path.name: path.stat().st_mode & 0o777 for path in [*run.glob("adapter/*"), *run.glob("checkpoints/*/*")] if path.is_file()}
    assert "adapter_model.safetensors" in modes and len(set(modes.values())) == 1, modes
