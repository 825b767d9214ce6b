"""Folders of shards, and servers that send whole files only."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest

from tests.conftest import run_command, write_config
from vlm_dist.config import DataConfig
from vlm_dist.data import storage as storing
from vlm_dist.data.dataset import open_dataset, open_datasets, open_heldout
from vlm_dist.data.shards import find_paths
from vlm_dist.data.storage import Storage
from vlm_dist.errors import DataError


@pytest.fixture
def folder(shards, tmp_path) -> Path:
    """As `data pack` leaves it: shards of both parts, and their index."""
    (tmp_path / "data").mkdir()
    for part in ("train", "heldout"):
        for number, path in enumerate(shards[f"qa-{part}"]):
            shutil.copy(path, tmp_path / "data" / f"{part}-{number:06d}.tar")
    return tmp_path / "data"


def test_a_folder_means_its_shards(folder, caplog, monkeypatch):
    """Those that are trained on, or those that are held out, by their names; what is left out is told."""
    names = sorted(path.name for path in folder.glob("*.tar"))
    train = find_paths([str(folder)], "data.train")
    assert [Path(path).name for path in train] == [name for name in names if name.startswith("train")]
    assert "data.train: of the folder" in caplog.text and "left out by their names: heldout-000000.tar" in caplog.text
    assert [Path(path).name for path in find_paths([str(folder)], "data.heldout")] == [name for name in names if "heldout" in name]
    assert len(find_paths([f"{folder}/"], "data index")) == len(names)
    config = DataConfig(train=[str(folder)], heldout=[str(folder)])
    assert len(open_datasets(config)[0].index) == 60 and len(open_heldout(config).index) == 12
    for path in folder.glob("heldout-*"):
        path.rename(folder / path.name.replace("heldout", "contest"))  # no word of its own
    assert len(find_paths([str(folder)], "data.train")) == len(names)


def test_a_folder_without_shards(settings, tmp_path):
    """One line, which names the command that makes shards of it."""
    (tmp_path / "pictures").mkdir()
    with pytest.raises(
        DataError, match=r"data.train: the folder '.*pictures' holds no shard \(\*.tar\); .*`vlm-dist data pack .*pictures OUT`"
    ):
        find_paths([str(tmp_path / "pictures")], "data.train")
    with pytest.raises(DataError, match="make shards of your data with `vlm-dist data pack`"):
        find_paths(["missing-*.tar"], "data.train")
    settings["data"]["train"] = [str(tmp_path / "pictures")]
    done = run_command("train", str(write_config(settings, tmp_path)))
    assert done.returncode == 3 and "holds no shard" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def plain_server(folder, monkeypatch, tmp_path):
    """`python -m http.server`, which knows no ranges; its address, and the paths that were asked of it."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            return None

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_server_that_knows_no_ranges(plain_server, folder, monkeypatch):
    """Said at the first answer, with the setting that helps; with it every shard is fetched once, and read here."""
    monkeypatch.setattr(storing.time, "sleep", lambda _: pytest.fail("it was tried again"))
    address, asked = plain_server
    pattern = f"{address}/train-{{000000..000002}}.tar"
    with pytest.raises(DataError, match=r"sends whole files, not the ranges .*; set data.cache_whole: true"):
        open_dataset([pattern], "data.train", Storage()).raw(7)
    asked.clear()
    config = DataConfig(train=[pattern], cache_whole=True)
    (dataset,) = open_datasets(config)
    here = open_dataset([str(folder / "train-*.tar")], "data.train", Storage())
    assert len(dataset.index) == len(here.index) == 60
    for number in (0, 7, 59):
        there = dataset.raw(number)
        assert {name: there[name] for name in there if name != "__url__"} == {
            name: value for name, value in here.raw(number).items() if name != "__url__"
        }
    assert sorted(path for path in asked if path.endswith(".tar")) == [f"/train-{number:06d}.tar" for number in range(3)]
    again = open_datasets(config)[0]
    again.raw(3)
    assert sum(path.endswith(".tar") for path in asked) == 3  # kept from one start to the next


@pytest.mark.slow
def test_nothing_stays_locked(plain_server, settings, tmp_path):
    """A run whose server knows no ranges ends in one line; the same name then trains with the setting that the line names."""
    address, _ = plain_server
    settings["data"] |= {"train": [f"{address}/train-{{000000..000002}}.tar"], "heldout": []}
    config = str(write_config(settings, tmp_path))
    refused = run_command("train", config)
    assert refused.returncode == 3 and "data.cache_whole: true" in refused.stderr and "attempt" not in refused.stderr
    done = run_command("train", config, "data.cache_whole=true")
    assert done.returncode == 0, done.stderr
