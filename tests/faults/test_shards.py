"""Shards, index files, samples and pictures that are damaged, lie, or are far too large: named in one line, or read to their end."""

from __future__ import annotations

import io
import json
import logging
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, child_environment
from vlm_dist.cli.main import main
from vlm_dist.data import index as indexing
from vlm_dist.data import pictures
from vlm_dist.data.bounds import beginning_beyond
from vlm_dist.data.dataset import open_dataset
from vlm_dist.data.encode import Encoder
from vlm_dist.data.index import scan_shards
from vlm_dist.data.index_file import INDEX_NAME, Index, read_index, write_index
from vlm_dist.data.lengths import Ruler
from vlm_dist.data.pictures import decode_picture, decode_pixels
from vlm_dist.data.samples import Sample, parse_sample
from vlm_dist.data.shards import read_in_order
from vlm_dist.data.storage import Storage
from vlm_dist.data.tar import BLOCK
from vlm_dist.errors import BadSample, DataError


def write_tar(path: Path, samples: dict[str, bytes], **options) -> Path:
    """Members by name."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def texts(path: Path) -> list[tuple[str, bytes]]:
    dataset = open_dataset([str(path)], "data.train", Storage())
    return [(raw["__key__"], raw["txt"]) for raw in map(dataset.raw, range(len(dataset.index)))]


def refusal(path: Path, capsys) -> str:
    """The one line of `data index`, and of `data verify` the same."""
    assert main(["data", "index", str(path)]) == 3
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "Traceback" not in line
    assert main(["data", "verify", str(path), "--processes", "1", "--json"]) == 3
    assert line.partition("shard ")[2].strip() in json.loads(capsys.readouterr().out)["problems"][0]["reason"]
    return line


# Archives behind one another


def test_archives_put_behind_one_another_are_read_to_the_end(tmp_path):
    """Keys may repeat, with other first members, and the last key of one may be the first of the next."""
    first = write_tar(tmp_path / "a.tar", {"1.txt": b"one", "2.json": b"{}", "2.txt": b"two"})
    second = write_tar(tmp_path / "b.tar", {"2.txt": b"two again", f"{'long/' * 40}3.txt": b"three"})
    empty = write_tar(tmp_path / "empty.tar", {})
    whole = tmp_path / "c.tar"
    whole.write_bytes(b"".join(path.read_bytes() for path in (first, empty, second, first)))
    expected = [("1", b"one"), ("2", b"two"), ("2", b"two again"), (f"{'long/' * 40}3", b"three"), ("1", b"one"), ("2", b"two")]
    assert texts(whole) == expected
    assert [(raw["__key__"], raw["txt"]) for raw in read_in_order([str(whole)])] == expected


def test_an_older_index_of_such_a_shard_is_noticed(tmp_path, caplog):
    first, second = (write_tar(tmp_path / f"{name}.tar", {f"{name}.txt": b"x"}) for name in "ab")
    whole = tmp_path / "c.tar"
    whole.write_bytes(first.read_bytes() + second.read_bytes())
    full = scan_shards([str(whole)], "x", Storage())
    half = Index(full.shards, full.sizes, full.counts // 2, full.ends * 0 + 2, full.starts[:1])
    write_without_checksum(half, tmp_path / INDEX_NAME)
    assert [key for key, _ in texts(whole)] == ["a", "b"] and "go on behind what" in caplog.text


def test_a_shard_cut_behind_a_member_is_refused(tmp_path, capsys):
    """With no block of zeros, with one (an archive ends with two), and in the middle of a member, of a header."""
    whole = write_tar(tmp_path / "a.tar", {"1.txt": b"one", "2.txt": b"two" * 1000, "3.txt": b"\0" * 2048}).read_bytes()
    cut = tmp_path / "cut.tar"
    for length in (1024, 1024 + 512 + 3072, 1536, 1024 + 100):
        for zeros in (0, 1):
            cut.write_bytes(whole[:length] + bytes(zeros * BLOCK))
            assert "cut.tar' is " in refusal(cut, capsys)
    cut.write_bytes(whole[:1024] + bytes(BLOCK))
    assert "is cut short (one block of zeros at its end; an archive ends with two)" in refusal(cut, capsys)
    cut.write_bytes(whole[:1024] + bytes(BLOCK) + whole)
    assert "is damaged at byte 1,024 (a block of zeros between two members)" in refusal(cut, capsys)
    cut.write_bytes(whole + b"something else".ljust(BLOCK) + bytes(BLOCK))
    assert f"is damaged at byte {len(whole):,} (behind the end-of-archive mark stands what is no tar)" in refusal(cut, capsys)


# Headers that lie


def with_header(block: bytes, **fields: bytes) -> bytes:
    """A tar header with some of its bytes changed, and a right checksum."""
    places = {"size": 124, "type": 156, "name": 0}
    changed = bytearray(block)
    for name, value in fields.items():
        changed[places[name] : places[name] + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = f"{sum(changed):06o}\0 ".encode()
    return bytes(changed)


def pax(**records: str) -> bytes:
    """A pax header and its records."""
    member = tarfile.TarInfo("x.txt")
    member.pax_headers = {name.replace("__", "."): value for name, value in records.items()}
    return member.tobuf(tarfile.PAX_FORMAT)[:-BLOCK]


HEADER = with_header(tarfile.TarInfo("2.txt").tobuf(tarfile.GNU_FORMAT), size=b"00000000003\0")
BASE_256 = b"\x80" + bytes(3) + (10**15).to_bytes(8, "big")
LONG = b"d" * 200 + b".txt\0"
LONG_NAME = with_header(HEADER, name=b"././@LongLink\0", type=b"L", size=f"{len(LONG):011o}\0".encode()) + LONG.ljust(BLOCK, b"\0")
LIES = {
    "base-256 size": with_header(HEADER, size=BASE_256),
    "negative base-256 size": with_header(HEADER, size=b"\xff" * 12),
    "octal size": with_header(HEADER, size=b"77777777777\0"),
    "size that is no number": with_header(HEADER, size=b"12x45\0"),
    "pax size": pax(size="1000000000000") + HEADER,
    "pax size that is no number": pax(size="-5") + HEADER,
    "pax size of thousands of digits": pax(size="9" * 5000) + HEADER,
    "pax header that is longer than the file": with_header(HEADER, type=b"x", size=BASE_256),
    "pax records that are none": with_header(HEADER, type=b"x") + b"nop".ljust(BLOCK, b"\0") + HEADER,
    "pax record longer than its header": with_header(HEADER, type=b"x", size=b"00000000011\0") + b"99 size=1".ljust(BLOCK, b"\0") + HEADER,
    "old GNU sparse": with_header(HEADER, type=b"S"),
    "pax sparse": pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="99") + HEADER,
    "long name of 8 GB": with_header(HEADER, type=b"L", size=b"77777777777\0"),
    "long name without a member": LONG_NAME,
    "pax header without a member": pax(path="2.txt"),
    "header with another checksum": HEADER[:20] + b"?" + HEADER[21:],
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie_are_named_with_their_byte(tmp_path, capsys, lie):
    """Behind a sound member, before the content of another and an honest end: in `data index`, `data verify` and as an index says it."""
    sound = write_tar(tmp_path / "a.tar", {"1.txt": b"one"}).read_bytes()[: 2 * BLOCK]
    path = tmp_path / "lies.tar"
    path.write_bytes(sound + LIES[lie] + (b"" if "without a member" in lie else b"two".ljust(BLOCK, b"\0")) + bytes(20 * BLOCK))
    assert re.search(r"lies.tar' is damaged at byte [126],\d\d\d \(.+\); copy or make it again", refusal(path, capsys))


def test_true_extended_headers_are_read(tmp_path):
    member = write_tar(tmp_path / "a.tar", {"2.txt": b"two"}).read_bytes()[BLOCK : 2 * BLOCK]
    small = with_header(HEADER, size=b"00000000000\0")
    path = tmp_path / "b.tar"
    shared = with_header(HEADER, type=b"g", size=b"00000000017\0") + b"15 comment=abc\n".ljust(BLOCK, b"\0")
    folder = with_header(HEADER, name=b"folder/\0", type=b"5", size=b"00000001000\0")  # a folder has no content, whatever it says
    path.write_bytes(shared + pax(size="3") + small + member + LONG_NAME + HEADER + member + folder + HEADER + member + bytes(2 * BLOCK))
    assert texts(path) == [("2", b"two"), ("d" * 200, b"two"), ("2", b"two")]
    with tarfile.open(path) as tar:
        assert [(one.name, one.size) for one in tar if one.isreg()] == [("2.txt", 3), ("d" * 200 + ".txt", 3), ("2.txt", 3)]


def test_no_damage_of_one_byte_is_a_traceback(tmp_path, shards):
    """Flipped bytes anywhere, cut anywhere, seeded: sound, or one DataError; never something else, and never fewer samples."""
    whole = Path(shards["qa-train"][0]).read_bytes()
    count, draw, path = 20, random.Random(7), tmp_path / "x.tar"
    for _ in range(150):
        damaged = bytearray(whole)
        if draw.random() < 0.5:
            place = draw.randrange(len(whole) // BLOCK) * BLOCK + draw.choice((0, 100, 124, 125, 130, 150, 156, 345))
            damaged[place] ^= 1 << draw.randrange(8)
        else:
            del damaged[draw.randrange(len(whole)) :]
        path.write_bytes(damaged)
        try:
            dataset = open_dataset([str(path)], "x", Storage())
            assert len(dataset.index) >= count - 1 and len(damaged) > len(whole) - 10_240
            for number in range(len(dataset.index)):
                dataset.raw(number)
        except (DataError, BadSample) as error:
            assert "\n" not in str(error) and "when the run began" not in str(error)


def test_an_empty_shard_beside_good_ones_is_told(tmp_path, shards, caplog):
    empty = write_tar(tmp_path / "empty.tar", {})
    with caplog.at_level(logging.WARNING, "vlm_dist"):
        assert len(open_dataset([shards["qa-train"][0], str(empty)], "data.train", Storage()).index) == 20
    assert "empty.tar' of 2 holds no sample; make it again, or leave it out" in caplog.text


# Index files


def write_without_checksum(index: Index, path: Path) -> None:
    """As older versions wrote it."""
    from safetensors.numpy import save_file

    about = {"version": 1, "names": [shard.rsplit("/", 1)[-1] for shard in index.shards]}
    save_file({name: getattr(index, name) for name in ("sizes", "counts", "ends", "starts")}, path, {"index": json.dumps(about)})


@pytest.fixture
def indexed(tmp_path, shards) -> tuple[list[str], Path]:
    paths = [shutil.copy(path, tmp_path) for path in shards["qa-train"]]
    write_index(scan_shards(paths, "x", Storage()), tmp_path / INDEX_NAME)
    return paths, tmp_path / INDEX_NAME


def test_a_damaged_index_is_one_line(indexed):
    """Each bit of the header's lengths and of many other bytes; every cut."""
    paths, path = indexed
    whole, draw = path.read_bytes(), random.Random(3)
    places = [*range(16), *draw.sample(range(16, len(whole)), 150)]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        try:
            assert len(open_dataset(paths, "x", Storage()).index) == 60, f"byte {place}"
        except DataError as error:
            assert str(path) in str(error) and "vlm-dist data index" in str(error) and "\n" not in str(error)
    for length in (0, 3, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cannot be read as an index .*; make it again with `vlm-dist data index`"):
            open_dataset(paths, "x", Storage())


def test_a_flipped_bit_of_the_numbers_is_found_by_the_checksum(indexed):
    _, path = indexed
    data = bytearray(path.read_bytes())
    data[-4 * 60 + 8] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="its checksum is another"):
        read_index(path)


def test_an_older_index_without_a_checksum_is_read_and_looked_at(indexed):
    paths, path = indexed
    index = read_index(path)
    write_without_checksum(index, path)
    assert not read_index(path).is_checked and len(open_dataset(paths, "x", Storage()).index) == 60
    for broken in (
        {"counts": index.counts + 1}, {"ends": index.ends + 10_000}, {"starts": index.starts[::-1].copy()}, {"sizes": index.sizes[:2]},
        {"counts": -index.counts}, {"starts": index.starts.astype("float32")},
    ):  # fmt: skip
        write_without_checksum(replace(index, **broken), path)
        with pytest.raises(DataError, match=r"cannot be read as an index \(damaged: "):
            read_index(path)


def test_a_damaged_index_of_the_cache_is_made_anew(tmp_path, shards, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(indexing, "WORTH_KEEPING", 1)
    assert len(open_dataset(shards["qa-train"], "x", Storage()).index) == 60
    (kept,) = (tmp_path / "vlm_dist" / "index").glob("*.safetensors")
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-9] + b"?" + whole[-8:]):
        kept.write_bytes(damaged)
        caplog.clear()
        assert len(open_dataset(shards["qa-train"], "x", Storage()).index) == 60
        assert "made anew" in caplog.text and kept.read_bytes() == whole


# Samples that are far too long


def sample(messages: list[dict]) -> Sample:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    raw = {"__key__": "k", "__url__": "u", "json": json.dumps({"messages": messages}).encode(), "png": file.getvalue()}
    return parse_sample(raw, max_image_pixels=10**6, caption_prompt="x")


def dialogue(turns: int, answer: str = "It is {}.") -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": (answer if number % 2 else "What is {}?").format(number)} for number in range(turns)]


HUGE = 5_000_000
ENDLESS = {
    "6,000 turns": dialogue(6000),
    "6,000 turns with thoughts": dialogue(6000, "<think>hm</think> It is {}."),
    "words": [*dialogue(1), {"role": "assistant", "content": "some words here " * (HUGE // 16)}],
    "one word": [*dialogue(1), {"role": "assistant", "content": "a" * HUGE}],
    "spaces": [*dialogue(1), {"role": "assistant", "content": "x" + " " * HUGE + "y"}],
    "spaces of a thought": [*dialogue(1), {"role": "assistant", "content": "<think>" + " " * HUGE + "x</thin"}],
    "a question": [{"role": "user", "content": "why " * (HUGE // 4)}, {"role": "assistant", "content": "a"}],
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("family", ["llava", "qwen3_5"])
def test_what_is_far_too_long_is_refused_at_once(checkpoint, name, family):
    """Whatever makes it long, by `encode` and by the ruler that packing asks: 0.1 to 0.4 s of CPU each; to the end it would be minutes."""
    from transformers import AutoProcessor

    encoder = Encoder(AutoProcessor.from_pretrained(checkpoint(family)), max_seq_length=2048)
    ruler, given = Ruler(encoder), sample(ENDLESS[name])
    for call in (lambda: encoder.encode(given), lambda: ruler.measure(given.messages, given.sizes)):
        before = time.process_time()
        with pytest.raises(BadSample, match=r"too long: at least \d+ tokens, more than data.max_seq_length=2048; raise it, or set"):
            call()
        assert time.process_time() - before < 20


@pytest.mark.parametrize("name", [name for name in ENDLESS if "thought" not in name])
@pytest.mark.parametrize("family", ["llava", "qwen3_5"])
def test_what_is_cut_is_not_read_to_its_end(checkpoint, name, family, monkeypatch):
    """The same tokens and labels as of a text that is only just long enough, and no tokenizer sees more than a multiple of that."""
    from transformers import AutoProcessor

    encoder = Encoder(AutoProcessor.from_pretrained(checkpoint(family)), max_seq_length=256, on_too_long="truncate")
    tokenizer, seen = type(encoder.processor.tokenizer), []
    real = tokenizer._encode_plus

    def counted(self, text, *more, **options):
        seen.append(max(map(len, [text] if isinstance(text, str) else text)))
        return real(self, text, *more, **options)

    monkeypatch.setattr(tokenizer, "_encode_plus", counted)
    given = sample(ENDLESS[name])
    if name == "a question":
        with pytest.raises(BadSample, match="all of it was cut"):
            encoder.encode(given)
    else:
        found = encoder.encode(given)
        short = [{**turn, "content": turn["content"][:6_000]} for turn in ENDLESS[name][:200]]
        expected = Encoder(encoder.processor, 10**6).encode(sample(short))
        assert found.length == 256 and ("cut", "too long") in found.notes
        assert torch.equal(found.inputs["input_ids"], expected.inputs["input_ids"][:, :256])
        assert torch.equal(found.labels, expected.labels[:, :256])
    assert Ruler(encoder).measure(given.messages, given.sizes).tokens > 256
    assert max(seen) < 40_000


def test_a_picture_behind_the_cut_is_not_lost_without_a_word(llava):
    from transformers import AutoProcessor

    encoder = Encoder(AutoProcessor.from_pretrained(llava), max_seq_length=256, on_too_long="truncate")
    late = [{"role": "user", "content": "why " * 100_000 + "<image>"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(BadSample, match=r"too long: at least \d+ tokens, .*; cutting would lose picture tokens"):
        encoder.encode(sample(late))


def test_the_bound_never_refuses_what_fits(llava):
    """Near the limit the real count decides, to the token."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(llava)
    for text in ("a " * 300, "the picture shows " * 200, "\U0001f600" * 100, "x" + " " * 3000):
        given = sample([*dialogue(1), {"role": "assistant", "content": text + "."}])
        length = Encoder(processor, 10**6).encode(given).length
        assert Encoder(processor, length).encode(given).length == length
        with pytest.raises(BadSample, match="too long"):
            Encoder(processor, length - 1).encode(given)
        for limit in (length, length + 100):
            assert beginning_beyond(text, limit, processor.tokenizer) is None


def test_thoughts_are_found_as_before():
    """As the regular expression that took time quadratic in spaces found them."""
    from vlm_dist.data.thoughts import thought_of

    pattern, draw = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)", re.DOTALL), random.Random(0)
    for _ in range(20_000):
        text = "".join(draw.choice(["<think>", "</think>", " ", "\n", "a", "b", "<", "\u3000"]) for _ in range(draw.randrange(9)))
        found, thought = pattern.match(text), thought_of(text)
        assert (found is None) == (thought is None)
        if found and thought:
            assert (found[1], found[2], found[3], text[found.end() :]) == tuple(thought)


# Pictures that are small files and large pictures


def encoded(mode: str, size: tuple[int, int], **options) -> bytes:
    """A PNG of changing values."""
    import numpy as np
    from PIL import Image

    width, height = size
    values = np.add.outer(np.arange(height), np.arange(width))
    if mode == "I;16":
        picture = Image.fromarray((values * 300 % 65536).astype(np.uint16))
    else:
        picture = Image.fromarray(np.stack([(values * (3 + number)) % 256 for number in range(4)], -1).astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


KINDS = [
    ("1", {}), ("L", {}), ("L", {"transparency": 6}), ("P", {}), ("P", {"transparency": bytes(range(256))}), ("RGB", {}),
    ("RGB", {"transparency": (3, 4, 5)}), ("RGBA", {}), ("LA", {}), ("I;16", {}), ("I;16", {"transparency": 900}),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "options"), KINDS)
def test_pictures_converted_in_strips_are_the_same(mode, options, monkeypatch):
    """Whatever the strips; compared with one strip, which is Pillow's whole conversion, and on white where nothing covers it."""
    import numpy as np

    data = encoded(mode, (37, 53), **options)
    whole = np.array(decode_picture(data, "x", 10**6))
    for strip in (1, 37, 100, 37 * 52):
        monkeypatch.setattr(pictures, "STRIP", strip)
        assert (np.array(decode_picture(data, "x", 10**6)) == whole).all()
        assert (decode_pixels(data, "x", 10**6).permute(1, 2, 0).numpy() == whole).all()


MEASURE = """
import resource, sys, time
from vlm_dist.data.pictures import decode_picture
data = open(sys.argv[1], "rb").read()
decode_picture(open(sys.argv[2], "rb").read(), "x", 10**8)
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
decode_picture(data, "x", 10**8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, time.process_time() - began)
"""


@pytest.mark.parametrize("mode", ["P", "RGBA", "I;16"])
def test_a_small_file_of_a_large_picture_is_decoded_within_a_budget(tmp_path, mode):
    """At most the picture as it lies in the file and as RGB (4 bytes a pixel each in Pillow), and some strips."""
    from PIL import Image

    side = 4000
    options = {"transparency": 0} if mode == "P" else {}
    Image.new(mode, (side, side)).save(tmp_path / "large.png", **options)
    Image.new(mode, (16, 16)).save(tmp_path / "small.png", **options)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large.png"), str(tmp_path / "small.png")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=child_environment(), timeout=120)
    used, seconds = map(float, told.stdout.split())
    assert used < side * side * 8 + 60 * 2**20 and seconds < 30, (used / 2**20, seconds)


@pytest.mark.filterwarnings("ignore:.*decompression bomb")  # quiet.py says so for the commands
def test_a_bomb_is_told_by_our_limit():
    """Pillow has limits of its own; the key that a user can change is what is named."""
    header = io.BytesIO(encoded("L", (8, 8)))
    data = bytearray(header.getvalue())
    for width, height in ((20_000, 20_000), (12_000, 10_000)):
        data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        with pytest.raises(BadSample, match=r"x: .* pixels, more than data.max_image_pixels=1,000,000$"):
            decode_picture(bytes(data), "x", 10**6)
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(BadSample, match=r"x: 400,000,000 pixels, more than Pillow opens \(178,956,970\)"):
        decode_picture(bytes(data), "x", 10**9)


def test_no_object_of_python_is_named():
    whole = encoded("RGBA", (40, 40))
    others = (b"", b"x", b"\x89PNG\r\n\x1a\n" + bytes(50), b"RIFF\0\0\0\0WEBPVP8 ", b"\xff\xd8\xff")
    for data in (*others, whole[:20], whole[:60], whole[: len(whole) // 2]):
        with pytest.raises(BadSample) as told:
            decode_picture(data, "x.png", 10**6)
        assert "object at 0x" not in str(told.value) and "_io." not in str(told.value)
