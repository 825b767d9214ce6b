"""The pages that are served here answer to the host they were bound to, and the chat to who has its token."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from pathlib import Path

import pytest

from vlm_dist.hosts import host_check
from vlm_dist.reporting.watch import serve_report


def ask(port: int, host: str | None, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of an answer, with this Host header."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {**({"Host": host} if host is not None else {}), **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, dict(answer.getheaders())


@pytest.mark.parametrize(
    ("bound", "ours", "others"),
    [
        (
            "127.0.0.1",
            ["127.0.0.1", "127.0.0.1:8008", "localhost:9", "LOCALHOST", "localhost.", "[::1]:8008"],
            ["evil.org", "evil.org:8008", "127.0.0.1.evil.org", "localhost.evil.org", "10.0.0.1", "", " ", "a@b", "a b", "[::1", "x:y"],
        ),
        ("localhost", ["localhost", "127.0.0.1:1"], ["evil.org", "8.8.8.8"]),
        ("::1", ["[::1]:7", "localhost", "127.0.0.1"], ["evil.org", "[::2]"]),
        ("0.0.0.0", ["10.1.2.3:8008", "localhost", "[fd00::1]:8", socket.gethostname()], ["evil.org", "evil.org:8008", ""]),
        ("192.0.2.7", ["192.0.2.7:1"], ["192.0.2.8", "localhost", "127.0.0.1", "evil.org"]),
    ],
)  # fmt: skip
def test_which_hosts_are_ours(bound, ours, others):
    is_ours = host_check(bound)
    assert [host for host in ours if not is_ours(host)] == [] and [host for host in others if is_ours(host)] == []


def test_the_watched_report_answers_its_host_only(tmp_path):
    (tmp_path / "config.yaml").write_text("name: demo\n")
    counts = {"step": 1, "samples": 8, "tokens": 100, "label_tokens": 10, "peak_memory_bytes": 2**30}
    speed = {"tokens_per_s": 50.0, "step_s": 2.0, "data_wait_s": 0.1, "padding_fraction": 0.1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**counts, **speed, "loss": 5.0, "lr": 1e-3, "grad_norm": 1.0}) + "\n")
    with serve_report(tmp_path, host="127.0.0.1", port=0, every=5) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        for host in (f"127.0.0.1:{port}", "localhost:9000"):
            assert ask(port, host)[0] == 200
        for host in ("evil.org", f"evil.org:{port}", "", None):
            status, text, _ = ask(port, host)
            assert status == 421 and "answers only where it was opened" in text and "demo" not in text
        server.shutdown()


@pytest.fixture(scope="module")
def page(checkpoint):
    """The chat's page of a tiny model, with a token."""
    pytest.importorskip("gradio")
    from vlm_dist.serving.chat import Chat
    from vlm_dist.serving.chat_page import serve_page

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = serve_page(Chat(checkpoint("llava"), max_new_tokens=4), "talk", host="127.0.0.1", port=port, token="secret-token")
    yield port
    served.close()


WITHOUT = ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret-token"}, {"Cookie": "vlm_dist_chat_x=secret-token; ;;="})
API = ("/", "/config", "/gradio_api/info", "/gradio_api/queue/data?session_hash=x", "/gradio_api/file=/etc/hostname")


@pytest.mark.slow
def test_the_chat_answers_its_host_only(page):
    for path in API:
        status, text, _ = ask(page, "evil.org", path, Authorization="Bearer secret-token")
        assert status == 421 and "answers only where it was opened" in text, path


@pytest.mark.slow
def test_the_chat_needs_its_token(page):
    for path in API:
        for headers in WITHOUT:
            status, text, _ = ask(page, "localhost", path, **headers)
            assert status == 401 and "a token is needed" in text, path
    assert ask(page, "localhost", "/gradio_api/queue/join", "POST", Content_Length="0")[0] == 401
    assert ask(page, "localhost", "/?token=wrong")[0] == 401


@pytest.mark.slow
def test_the_printed_address_opens_the_chat(page):
    """It sets a cookie that scripts cannot read, and leads to the page without the token in its address."""
    status, _, headers = ask(page, f"127.0.0.1:{page}", "/?token=secret-token")
    assert status == 303 and headers["location"] == "."
    assert "HttpOnly" in headers["set-cookie"] and "SameSite=Lax" in headers["set-cookie"]
    cookie = headers["set-cookie"].partition(";")[0]
    for given in ({"Cookie": f"other=1; {cookie}"}, {"Authorization": "Bearer secret-token"}):
        status, text, _ = ask(page, f"127.0.0.1:{page}", "/", **given)
        assert status == 200 and "talk" in text
        assert ask(page, f"127.0.0.1:{page}", "/config", **given)[0] == 200


def test_the_command_prints_an_address_with_a_token(monkeypatch, capsys):
    """What serves is left out here; it is the tests above."""
    from argparse import Namespace

    from vlm_dist.cli import chat
    from vlm_dist.serving import chat_page

    class Page:
        server_port = 7
        block_thread = staticmethod(lambda: None)

    tokens = []
    monkeypatch.setattr(chat_page, "serve_page", lambda *_, token, **__: tokens.append(token) or Page)
    for _ in range(2):
        assert chat._on_page(None, Namespace(source=str(Path("runs/x")), host="127.0.0.1", port=7)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"http://127.0.0.1:7/?token={token}  (Ctrl-C ends it)" for token in tokens]
    assert tokens[0] != tokens[1] and min(map(len, tokens)) >= 20
