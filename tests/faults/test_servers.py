"""Servers of shards that fail, refuse, know no ranges, or lead elsewhere: tried again as documented, or told in one line."""

from __future__ import annotations

import email.utils
import http.server
import logging
import socket
import threading
import time
import urllib.parse
from pathlib import Path

import aiohttp
import pytest

from vlm_dist.cli.main import main
from vlm_dist.data import storage as storing
from vlm_dist.data import web
from vlm_dist.data.addresses import is_inside, redirect_problem
from vlm_dist.data.dataset import open_dataset
from vlm_dist.data.storage import Storage
from vlm_dist.errors import DataError
from vlm_dist.testing.server import FileHandler


class Handler(FileHandler):
    """Files below `server.folder`. `server.faults`, one a request: a status, (status, headers), or "whole" (ranges are not known)."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path))
        fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        path = self.server.folder / self.path.lstrip("/").partition("?")[0]
        if fault is None and not path.is_file():
            fault = 404
        if fault in (None, "whole"):
            self.send_file(path, fault)
            return
        status, headers = fault if isinstance(fault, tuple) else (fault, {})
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.always, self.asked = folder, [], None, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        return None  # a client that hangs up: no words beside the command's own

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}/{path}"


@pytest.fixture
def server(tmp_path, shards, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storing, "FIRST_PAUSE_S", 0.01)
    served = Server(Path(shards["qa-train"][0]).parent)
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture
def shard(server, shards) -> str:
    return server.url(Path(shards["qa-train"][0]).name)


def opened(shard: str, storage: Storage | None = None) -> int:
    """How many samples; all are read."""
    dataset = open_dataset([shard], "data.train", storage or Storage())
    for number in range(len(dataset.index)):
        dataset.raw(number)
    return len(dataset.index)


def refusal(shard: str, capsys) -> str:
    """The one line of a command that reads it."""
    assert main(["data", "index", shard, "--out", "/dev/null/nowhere"]) == 3
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "Traceback" not in line
    return line


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408, 425])
def test_what_fails_when_a_shard_is_opened_is_tried_again(server, shard, status, caplog):
    server.faults = [404, 404, *[status] * 8]  # no index beside it; then HEAD and GET of the size, four times
    with caplog.at_level(logging.WARNING, "vlm_dist"):
        assert opened(shard) == 20
    assert f"the server answers {status}" in caplog.text and "(attempt 2 of 6)" in caplog.text


@pytest.mark.parametrize("status", [500, 503, 429])
def test_what_fails_while_the_headers_are_read_is_tried_again(server, shard, status):
    server.faults = [404, 404, None, None, status, status, None, status]
    assert opened(shard) == 20


@pytest.mark.parametrize("status", [500, 429])
def test_a_server_that_never_recovers_is_one_line(server, shard, status, capsys, monkeypatch):
    monkeypatch.setattr(storing, "ATTEMPTS", 3)
    server.always = status
    assert f"cannot be read after 3 attempts; the last: the server answers {status}" in refusal(shard, capsys)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_server_that_refuses_is_not_asked_again(server, shard, status, capsys):
    server.always = status
    assert f"cannot be read (the server answers {status}" in (line := refusal(shard, capsys)) and "check the address" in line
    assert len(server.asked) <= 4


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_says_how_long_to_wait_is_heard(server, shard, form):
    dataset = open_dataset([shard], "data.train", Storage())
    value = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    server.faults = [(429, {"Retry-After": value})]
    before = time.monotonic()
    dataset.raw(0)
    assert time.monotonic() - before > 0.9


@pytest.mark.parametrize("value", ["", "soon", "-5", "9" * 400, "Thu, 99 Foo 2020", "Mon, 01 Jan 1990 00:00:00 GMT"])
def test_a_wait_that_makes_no_sense_is_bounded(value):
    error = aiohttp.ClientResponseError(None, (), status=429, headers={"Retry-After": value})
    assert 0 <= web.asked_pause(error) <= web.LONGEST_ASKED_S


def test_a_server_without_ranges_is_one_line(server, shard, capsys, monkeypatch):
    """Told at once, without fetching all of it again and again."""
    server.always = "whole"
    monkeypatch.setattr(web, "BLOCK", 2**14)
    assert "sends whole files, not the ranges that it is asked for" in refusal(shard, capsys)
    server.always = None
    dataset = open_dataset([shard], "data.train", Storage())
    server.always, server.asked = "whole", []
    with pytest.raises(DataError, match="sends whole files, not the ranges"):
        dataset.raw(3)
    assert len(server.asked) == 1


def test_a_refused_connection_is_told_as_that(capsys, monkeypatch):
    monkeypatch.setattr(storing, "ATTEMPTS", 2)
    monkeypatch.setattr(storing, "FIRST_PAUSE_S", 0.01)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = refusal(f"http://127.0.0.1:{port}/x.tar", capsys)
    assert "after 2 attempts" in line and "Cannot connect" in line and "FileNotFoundError" not in line


# Redirects


def test_a_redirect_to_the_same_host_is_followed(server, shard):
    server.faults = [404, 404, *[(302, {"Location": shard + "?signed=1"}), None] * 2]
    assert opened(shard) == 20
    assert any("signed=1" in path for _, path in server.asked)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("http://169.254.169.254/latest/meta-data/iam", "that is inside a network"),
        ("http://10.0.0.1/x.tar", "that is inside a network"),
        ("http://[::1]:99/x.tar", "that is inside a network"),
        ("http://[fe80::1]/x.tar", "that is inside a network"),
        ("http://localhost:99/x.tar", "that is another host"),
        ("https://example.org/x.tar?token=secret", "that is another host"),
        ("http://127.0.0.1:1/x.tar", "that is another port"),
        ("file:///etc/passwd", "that is no http(s) address"),
        ("ftp://example.org/x.tar", "that is no http(s) address"),
    ],
)
def test_a_redirect_elsewhere_is_refused_by_name(server, shard, target, words, capsys):
    server.always = (307, {"Location": target})
    line = refusal(shard, capsys)
    assert words in line and "not followed" in line and "secret" not in line and "attempts" not in line
    server.always = None
    dataset = open_dataset([shard], "data.train", Storage())
    server.faults = [(302, {"Location": target})]  # in the middle of a run
    with pytest.raises(DataError, match="not followed"):
        dataset.raw(0)


def test_which_redirects_are_followed():
    followed = [
        ("http://data.org/a", "https://data.org/a"), ("https://archive.org/a", "https://ia800.us.archive.org/b"),
        ("https://huggingface.co/datasets/x/resolve/main/a.tar", "https://cas-bridge.xethub.hf.co/x?y=z"),
        ("https://github.com/a", "https://objects.githubusercontent.com/b"), ("http://10.0.0.5:80/a", "http://10.0.0.5/b"),
    ]  # fmt: skip
    assert [redirect_problem(*pair) for pair in followed] == [""] * len(followed)
    refused = [
        ("https://data.org/a", "http://data.org/a"), ("https://a.org/x", "https://b.org/x"), ("https://data.org/a", "https://data.org:444/a"),
        ("https://huggingface.co/x", "https://huggingface.co.evil.org/x"), ("https://8.8.8.8/a", "https://9.9.8.8/a"),
        ("https://a.archive.org/x", "http://b.archive.org/x"), ("https://data.org/a", "https:///x"),
    ]  # fmt: skip
    assert all(redirect_problem(*pair) for pair in refused)


def test_a_name_that_leads_inside_is_refused_when_it_is_looked_up(server, shard, monkeypatch):
    """A host of the same site whose name leads into the network (DNS is the server's)."""
    storage = Storage()
    storage.stamp(shard, "x")

    async def lies(self, host: str, port: int = 0, family: int = 0) -> list[dict]:
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}]

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", lies)
    monkeypatch.setattr(storage, "_hosts", {"127.0.0.1", "data.org"})
    assert (
        storage.stamp(server.url(Path(urllib.parse.urlsplit(shard).path).name, "data.org"), "x")[0] > 0
    )  # named by the user: his own server
    monkeypatch.setattr("vlm_dist.data.web.redirect_problem", lambda *_: "")
    server.faults = [(302, {"Location": server.url("x.tar", "sub.data.org")})] * 2
    with pytest.raises(DataError, match=r"sends on to 'sub.data.org', which leads to 127.0.0.1, inside a network; not followed"):
        storage.stamp(shard, "x")


def test_what_is_inside_a_network():
    inside = ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "::1", "fe80::1%eth0", "fd00::1"]
    inside += ["::ffff:10.0.0.1", "224.0.0.1"]
    assert all(map(is_inside, inside)) and not any(map(is_inside, ("8.8.8.8", "2606:4700::1111")))
