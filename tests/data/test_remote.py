"""Shards on servers: a real HTTP server and a real S3 server (moto) on this machine, through connections that fail in every way."""

from __future__ import annotations

import http.server
import itertools
import json
import logging
import os
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from vlm_dist.cli.main import main
from vlm_dist.config import DataConfig
from vlm_dist.data import storage as storing
from vlm_dist.data.cache import RangeCache
from vlm_dist.data.dataset import open_dataset, open_datasets
from vlm_dist.data.index import scan_shards
from vlm_dist.data.index_file import INDEX_NAME, write_index
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.shards import find_paths, read_in_order
from vlm_dist.data.storage import Storage
from vlm_dist.data.stream import open_stream
from vlm_dist.errors import DataError
from vlm_dist.testing.server import FileHandler


class Handler(FileHandler):
    """Files with ranges, and the faults that the server's `faults` names, one a request: 503, cut, slow, short."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path))
        fault = self.server.next_fault()
        if not data.is_file():
            self.send_error(404)
        elif isinstance(fault, int):
            self.send_error(fault)
        else:
            status, sent = self.send_file(data, fault, slow_s=2)
            self.server.served[self.path] += sent * (status == 206)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), lambda *arguments: Handler(*arguments, directory=str(folder)))
        self.faults: list = []
        self.happened: Counter = Counter()
        self.served: Counter = Counter()
        self._lock = threading.Lock()

    def next_fault(self):
        with self._lock:
            fault = self.faults.pop(0) if self.faults else None
            self.happened[fault] += 1
            return fault

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def served(tmp_path, shards):
    """A folder with three shards and their index, and a server of it."""
    folder = tmp_path / "served"
    folder.mkdir()
    for number, path in enumerate(shards["qa-train"]):
        shutil.copy(path, folder / f"part-{number}.tar")
    write_index(scan_shards(sorted(map(str, folder.glob("*.tar"))), "x", Storage()), folder / INDEX_NAME)
    server = Server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, folder
    server.shutdown()


@pytest.fixture(autouse=True)
def _own_cache_and_short_pauses(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(storing, "FIRST_PAUSE_S", 0.01)


def read(raw: dict) -> dict:
    return {name: value for name, value in raw.items() if name not in ("__url__", "__local_path__")}


def every(dataset) -> list[dict]:
    return [read(dataset.raw(number)) for number in range(len(dataset.index))]


def test_what_is_read_is_what_lies_there(served):
    server, folder = served
    expected = [read(raw) for raw in read_in_order(sorted(map(str, folder.glob("*.tar"))))]
    assert every(open_dataset([f"{server.address}/part-{{0..2}}.tar"], "x", Storage())) == expected
    (folder / INDEX_NAME).unlink()  # the headers are read instead
    assert every(open_dataset([f"{server.address}/part-{{0..2}}.tar"], "x", Storage())) == expected
    shards = [f"{server.address}/part-{number}.tar" for number in range(3)]
    assert [read(raw) for raw in read_in_order(shards)] == expected


def test_training_from_a_server_that_fails(served, tmp_path, llava, caplog):
    """503, 500, 429, cut connections and answers that do not come: the same samples in the same order, none quarantined."""
    from transformers import AutoProcessor

    server, folder = served
    processor = AutoProcessor.from_pretrained(llava)
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.01)

    def keys(train: list[str]) -> list[list[str]]:
        config = DataConfig(train=train, max_seq_length=256, shuffle_window=20, cache_dir=str(tmp_path / "cache"))
        batch = {"global_batch": 4, "micro_batch": 2, "rank": 0, "world_size": 1}
        stream = open_stream(config, processor, quarantine, seed=0, **batch)
        for dataset in stream.datasets:
            dataset.storage.timeout_s = 0.5
        try:
            return [list(itertools.chain(*step.keys)) for step in itertools.islice(stream.steps(), 15)]
        finally:
            stream.close()

    expected = keys([f"{folder}/part-{{0..2}}.tar"])
    server.faults = [fault for _ in range(5) for fault in (503, "cut", 500, "slow", None, 429, None)]
    with caplog.at_level(logging.WARNING, logger="vlm_dist"):
        assert keys([f"{server.address}/part-{{0..2}}.tar"]) == expected
    assert all(server.happened[fault] for fault in (503, "cut", 500, "slow", 429)) and not len(quarantine)
    assert "trying again" in caplog.text


@pytest.mark.parametrize("in_processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bytes_are_fetched_once(served, tmp_path, llava, in_processes):
    """An epoch and a half from a cache that holds everything: no byte of a shard comes twice."""
    from transformers import AutoProcessor

    server, folder = served
    config = DataConfig(train=[f"{server.address}/part-{{0..2}}.tar"], max_seq_length=256, cache_dir=str(tmp_path / "cache"))
    batch = {"global_batch": 4, "micro_batch": 2, "rank": 0, "world_size": 1}
    stream = open_stream(config, AutoProcessor.from_pretrained(llava), Quarantine(tmp_path / "q", 0.1), seed=0, **batch)
    stream.in_processes = in_processes
    assert sum(step.counts.samples for step in itertools.islice(stream.steps(), 22)) == 88
    shards = {path: size for path, size in server.served.items() if path.endswith(".tar")}
    total = sum((folder / path.lstrip("/")).stat().st_size for path in shards)
    assert len(shards) == 3 and 0.9 * total < sum(shards.values()) <= total


def test_gone_for_good_is_said_in_one_line(served, monkeypatch):
    server, _ = served
    monkeypatch.setattr(storing, "ATTEMPTS", 3)
    dataset = open_dataset([f"{server.address}/part-0.tar"], "x", Storage())
    server.faults = [503] * 10
    with pytest.raises(DataError, match=r"part-0.tar' cannot be read after 3 attempts; the last: .*503"):
        dataset.raw(0)
    server.faults = [403]
    with pytest.raises(DataError, match=r"cannot be read after 1 attempts; the last: .*403"):
        dataset.raw(0)
    with pytest.raises(DataError, match=r"other.tar' cannot be read \(the server answers 404 .*\); check the address"):
        open_dataset([f"{server.address}/other.tar"], "x", Storage())


def test_a_server_without_ranges(served, monkeypatch):
    """It answers with the whole file: said, not silently downloaded a thousand times."""
    server, _ = served
    monkeypatch.setattr(storing, "ATTEMPTS", 2)
    dataset = open_dataset([f"{server.address}/part-0.tar"], "x", Storage())
    server.faults = ["whole"] * 4
    with pytest.raises(DataError, match="sends whole files, not the ranges"):
        dataset.raw(0)


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"data.cache_dir: .*file/ranges' cannot be made .*; give a folder"):
        RangeCache(tmp_path / "file" / "ranges", 10_000)


def test_the_cache_keeps_to_its_limit(tmp_path):
    cache = RangeCache(tmp_path, 10_000)
    fetched: list[int] = []

    def fetch(path: str, start: int, length: int) -> bytes:
        fetched.append(start)
        return bytes([start // 1000]) * length

    for start in range(0, 30_000, 1000):
        assert cache.read("s3://b/x", "etag", (start, 1000), start + 10, 20, fetch) == bytes([start // 1000]) * 20
        assert sum(file.stat().st_size for file in tmp_path.glob("*.range")) <= 10_000
    newest = fetched[-1]
    cache.read("s3://b/x", "etag", (newest, 1000), newest, 5, fetch)
    assert fetched.count(newest) == 1
    cache.read("s3://b/x", "another etag", (newest, 1000), newest, 5, fetch)  # the file was written anew
    assert fetched.count(newest) == 2
    cache.close()


def test_many_ask_for_one_range_at_once(tmp_path):
    cache = RangeCache(tmp_path, 10_000)
    fetched: list[int] = []

    def fetch(path: str, start: int, length: int) -> bytes:
        fetched.append(start)
        time.sleep(0.1)
        return b"x" * length

    threads = [threading.Thread(target=cache.read, args=("p", "e", (0, 1000), 10 * i, 5, fetch)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == [0]


class FaultyS3:
    """moto's S3 behind a WSGI layer that answers some GETs with 503 (S3's "Slow Down"), or with half of what it promised."""

    def __init__(self):
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.application = DomainDispatcherApplication(create_backend_app)
        self.faults: list[str | None] = []
        self.happened: Counter = Counter()
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __call__(self, environ, start_response):
        is_read = environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ
        fault = self.faults.pop(0) if is_read and self.faults else None
        self.happened[fault] += 1
        if fault == "503":
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        if fault == "slow":
            time.sleep(2)
        body = b"".join(self.application(environ, start_response))
        return [body[: len(body) // 2] if fault == "cut" else body]


@pytest.fixture
def bucket(served, monkeypatch):
    """An S3 server with the same files in a bucket."""
    import s3fs

    faulty = FaultyS3()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{faulty.server.port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.makedirs("shards", exist_ok=True)  # moto keeps its buckets for as long as the process lives
    for path in served[1].iterdir():
        files.put_file(str(path), f"shards/deep/{path.name}")
    yield files, faulty
    faulty.server.shutdown()


def test_s3(served, bucket):
    files, _ = bucket
    expected = [read(raw) for raw in read_in_order(sorted(map(str, served[1].glob("*.tar"))))]
    assert find_paths(["s3://shards/deep/*.tar"], "x") == [f"s3://shards/deep/part-{number}.tar" for number in range(3)]
    assert every(open_dataset(["s3://shards/deep/part-*.tar"], "x", Storage())) == expected
    files.rm(f"shards/deep/{INDEX_NAME}")
    assert every(open_dataset(["s3://shards/deep/part-{0..2}.tar"], "x", Storage())) == expected
    with pytest.raises(DataError, match="no shard matches"):
        find_paths(["s3://shards/other/*.tar"], "x")
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(["s3://shards/deep/part-7.tar"], "x", Storage())


def test_an_index_is_written_beside_remote_shards(served, bucket, tmp_path, capsys):
    files, _ = bucket
    files.rm(f"shards/deep/{INDEX_NAME}")
    assert main(["data", "index", "s3://shards/deep/*.tar", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["samples"] == 60
    assert files.cat_file(f"shards/deep/{INDEX_NAME}") == (served[1] / INDEX_NAME).read_bytes()
    address = f"{served[0].address}/part-{{0..2}}.tar"
    assert main(["data", "index", address]) == 3  # a plain web server takes no files
    assert "give a folder with --out" in capsys.readouterr().err
    assert main(["data", "index", address, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / INDEX_NAME).read_bytes() == (served[1] / INDEX_NAME).read_bytes()


def test_s3_that_fails_in_passing(served, bucket):
    _, faulty = bucket
    expected = [read(raw) for raw in read_in_order(sorted(map(str, served[1].glob("*.tar"))))]
    dataset = open_dataset(["s3://shards/deep/part-*.tar"], "x", Storage(timeout_s=0.5))
    faulty.faults = [fault for _ in range(4) for fault in ("503", None, "cut", None, None)] + ["slow", *["503"] * 7]
    assert every(dataset) == expected
    assert faulty.happened["503"] == 11 and faulty.happened["cut"] == 4 and faulty.happened["slow"] == 1


def test_commands(tmp_path, shards, monkeypatch):
    """`pipe:` runs only where it is allowed, once, and what fails is said."""
    path = shards["qa-train"][0]
    config = DataConfig(train=[f"pipe:cat {path}"])
    with pytest.raises(DataError, match="would run a command"):
        open_datasets(config)
    ran = tmp_path / "ran"
    allowed = DataConfig(train=[f"pipe:echo x >> {ran}; cat {path}"], allow_commands=True)
    for _ in range(2):
        assert len(open_datasets(allowed)[0].index) == 20
    assert ran.read_text() == "x\n"
    with pytest.raises(DataError, match=r"ended with code 3: no such thing"):
        open_datasets(DataConfig(train=["pipe:echo no such thing >&2; exit 3"], allow_commands=True))
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.partial"))


def test_the_json_of_an_index_survives_odd_names(tmp_path, shards):
    odd = tmp_path / "ä b'\"{x}.tar"
    shutil.copy(shards["qa-train"][0], odd)
    write_index(scan_shards([str(odd)], "x", Storage()), tmp_path / INDEX_NAME)
    dataset = open_dataset([str(tmp_path / "*.tar")], "x", Storage())
    assert dataset.index.shards == [str(odd)] and len(every(dataset)) == 20
