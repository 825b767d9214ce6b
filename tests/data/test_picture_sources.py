"""A picture, however a record names it: the same bytes. And what may be fetched, from whom."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_dist.data.fetch import Fetcher
from vlm_dist.data.picture_sources import name_of, read_source
from vlm_dist.data.pictures import decode_picture, readable_formats
from vlm_dist.errors import BadSample


def encoded(kind: str = "PNG", size=(8, 6), colour=(200, 30, 60)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, kind)
    return data.getvalue()


PNG = encoded()
TEXT = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    ("on_disk", "named"),
    [
        ("a b [1].png", "a b [1].png"),
        ("a b.png", "a%20b.png"),
        ("a%20b.png", "a%20b.png"),
        ("sub/a.png", "sub\\a.png"),
        (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")),
        (unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")),
        ("a?b#c.png", "a?b#c.png"),
        ("é b.png", "%C3%A9%20b.png"),
    ],
)
def test_odd_paths(tmp_path, on_disk, named):
    (tmp_path / on_disk).parent.mkdir(exist_ok=True)
    (tmp_path / on_disk).write_bytes(PNG)
    assert read_source(named, tmp_path) == PNG
    assert read_source(f"file://{tmp_path}/{named}") == PNG and read_source({"path": named}, tmp_path) == PNG
    assert read_source((tmp_path / on_disk).as_uri()) == PNG


@pytest.mark.parametrize(
    "source",
    [
        PNG, bytearray(PNG), memoryview(PNG), np.frombuffer(PNG, np.uint8), torch.frombuffer(bytearray(PNG), dtype=torch.uint8),
        {"bytes": PNG, "path": None}, {"bytes": None, "path": None, "base64": TEXT}, TEXT, f"data:image/png;base64,{TEXT}",
        f"data:;base64,{TEXT.rstrip('=')}", f"DATA:image/png;charset=utf-8;BASE64,{TEXT[:40]}\n{TEXT[40:]}",
        {"url": f"data:;base64,{TEXT}"},
        {"source": {"type": "base64", "media_type": "image/png", "data": TEXT}}, TEXT.replace("+", "-").replace("/", "_"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    ],
)  # fmt: skip
def test_bytes_and_base64(source, tmp_path):
    assert read_source(source, tmp_path) == PNG


RAMP = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


@pytest.mark.parametrize(
    "source",
    [
        RAMP, RAMP.transpose(2, 0, 1), RAMP / np.float32(255), RAMP.astype(np.int64), RAMP.astype(np.float64), torch.from_numpy(RAMP),
        torch.from_numpy(RAMP).permute(2, 0, 1), torch.from_numpy(RAMP).permute(2, 0, 1) / 255, RAMP[None], RAMP.tolist(),
        torch.from_numpy(RAMP).permute(2, 0, 1)[None].requires_grad_(False), RAMP.astype(np.uint16) << 8, Image.fromarray(RAMP),
    ],
)  # fmt: skip
def test_arrays_and_tensors(source):
    assert np.array_equal(np.asarray(read_source(source)), RAMP)


def test_grey_and_other_arrays():
    assert np.array_equal(np.asarray(read_source(RAMP[:, :, 0])), RAMP[:, :, 0])
    assert np.array_equal(np.asarray(read_source(torch.from_numpy(RAMP[:, :, :1]).permute(2, 0, 1))), RAMP[:, :, 0])
    assert np.asarray(read_source(RAMP[:, :, 0] > 40)).max() == 255
    assert np.asarray(read_source(torch.ones(3, 2, 2, dtype=torch.bfloat16))).tolist() == [[[255] * 3] * 2] * 2
    assert read_source(torch.zeros(3, 2, 3)).size == (3, 2)  # a tensor's channels stand first


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("none.png", "'none.png' cannot be read below"), ("", "empty name"), ("a\0b", "cannot be read"), ("x" * 5000, "cannot be read"),
        ("data:image/png;base64,!!", "base64 cannot be read"), ("https://host/a.png", "is not fetched; --fetch fetches"),
        ("s3://bucket/a.png", "'s3://' is not read"), ({}, "an object with nothing"), ({"a": 1}, "an object with a; expected bytes"),
        (3.5, "array of \\[\\]"), (None, "a picture is a NoneType"), (object(), "a picture is a object"),
        (np.zeros((2, 3, 5)), "array of \\[2, 3, 5\\]"), (np.full((2, 2), -1.0), "from -1 to -1; expected 0 to 1"),
        (np.full((2, 2), np.nan), "from nan"), (np.full((2, 2), 300), "from 300 to 300"), (np.zeros((0, 3)), "a ndarray of float64"),
        ([["a"]], "a list of <U1"), ({"image": {"image": {"image": {"image": {"image": {"image": {}}}}}}}, "an object with image"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(source, words, tmp_path):
    with pytest.raises(BadSample, match=words) as caught:
        read_source(source, tmp_path)
    assert "\n" not in str(caught.value)


def test_names_for_messages():
    assert name_of("a/b.png") == "a/b.png" and name_of({"bytes": PNG, "path": "b.png"}) == "b.png" and name_of(Path("c")) == "c"
    assert name_of(PNG) == name_of(RAMP) == "in the record" and len(name_of(f"data:;base64,{TEXT}")) < 80


def test_other_formats_are_decoded():
    for kind in ("GIF", "BMP", "TIFF", "AVIF", "PPM"):
        picture = decode_picture(encoded(kind), "p", 10_000, readable_formats())
        assert picture.mode == "RGB" and picture.size == (8, 6)
    with pytest.raises(BadSample, match=r"a HEIC or AVIF picture; `pip install 'vlm_dist\[heif\]'` \(or pillow-heif\)"):
        decode_picture(b"\0\0\0\x18ftypheic" + bytes(40), "p", 10_000, readable_formats())
    with pytest.raises(BadSample, match="p: a PDF; expected a picture that Pillow can read"):
        decode_picture(b"%PDF-1.4", "p", 10_000, readable_formats())
    with pytest.raises(BadSample):  # would run Ghostscript
        decode_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\n", "p", 10_000, readable_formats())


class Handler(http.server.SimpleHTTPRequestHandler):
    failures: list[int] = []

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif self.path == "/busy.png" and self.failures:
            self.send_error(self.failures.pop())
        else:
            super().do_GET()

    def log_message(self, *_):
        """Not here."""


@pytest.fixture
def server(tmp_path):
    for name in ("a b.png", "busy.png"):
        (tmp_path / name).write_bytes(PNG)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path))) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_fetching(server):
    fetcher = Fetcher(allow_private=True, pause_s=0.01, timeout_s=5)
    assert read_source(f"{server}/a b.png", fetcher=fetcher) == PNG and read_source(f"{server}/to//a%20b.png", fetcher=fetcher) == PNG
    Handler.failures = [503, 500]
    assert read_source(f"{server}/busy.png", fetcher=fetcher) == PNG
    Handler.failures = [503] * 3
    with pytest.raises(BadSample, match=r"busy.png.*the server answers 503"):
        read_source(f"{server}/busy.png", fetcher=fetcher)
    with pytest.raises(BadSample, match="answers 404"):
        read_source(f"{server}/none.png", fetcher=fetcher)
    for small, words in (
        (Fetcher(allow_private=True, most_bytes=10), "more than 10"),
        (Fetcher(True, attempts=1, whole_s=-1), "not whole"),
    ):
        with pytest.raises(BadSample, match=words):
            small.read(f"{server}/a b.png")


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1/", "http://localhost/a", "http://169.254.169.254/latest", "http://10.0.0.1/", "http://[::1]/", "http://0.0.0.0/",
     "http://[::ffff:127.0.0.1]/", "http://2130706433/", "http://192.168.1.1/", "http://[fe80::1]/", "http://100.64.0.1/"],
)  # fmt: skip
def test_nothing_is_fetched_from_inside_a_network(address):
    with pytest.raises(BadSample, match="inside a network"):
        Fetcher(timeout_s=1).read(address)


def test_a_redirect_or_a_name_does_not_lead_inside(server, monkeypatch):
    with pytest.raises(BadSample, match="the server answers 302"):
        Fetcher(allow_private=True).read(f"{server}/to/file:///etc/passwd")
    monkeypatch.setattr(Fetcher, "check", lambda *_: None)  # the name was harmless when it was asked; the connection is not
    with pytest.raises(BadSample, match="inside a network"):
        Fetcher().read(f"{server}/a b.png")


def test_bytes_written_as_base64_in_an_object():
    from vlm_dist.data.picture_sources import read_source

    assert read_source({"bytes": base64.b64encode(b"\xff\xd8\xff picture").decode()}) == b"\xff\xd8\xff picture"
    with pytest.raises(BadSample):
        read_source({"bytes": "no base64 !"})
