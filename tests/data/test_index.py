"""The index finds every sample where it lies, is kept and reused, and refuses shards that are not those it was made of."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from vlm_dist.cli.main import main
from vlm_dist.data import index as indexing
from vlm_dist.data.dataset import Dataset, open_dataset
from vlm_dist.data.index import open_index, scan_shards
from vlm_dist.data.index_file import INDEX_NAME, read_index, write_index
from vlm_dist.data.shards import read_in_order, write_shards
from vlm_dist.data.storage import Storage
from vlm_dist.errors import DataError


@pytest.fixture
def folder(tmp_path, shards) -> list[str]:
    """Copies of three shards, in a folder of their own."""
    return [shutil.copy(path, tmp_path) for path in shards["qa-train"]]


def every(paths: list[str]) -> list[dict]:
    dataset = Dataset("x", open_index(paths, "x", Storage()), Storage())
    return [dataset.raw(number) for number in range(len(dataset.index))]


def test_any_sample_is_read_as_webdataset_reads_it(folder):
    assert every(folder) == list(read_in_order(folder))


def test_names_of_any_length_folders_links_and_other_members(tmp_path):
    """Long names (pax headers), names in folders, members without an extension, `__meta__`, links: the same samples as webdataset."""
    samples = [{"__key__": f"{'deep/' * 30}{number}", "txt": b"a" * number} for number in range(5)]
    write_shards(tmp_path, "long", samples, samples_per_shard=9)
    with tarfile.open(tmp_path / "odd.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("readme", "__meta__", "a.txt", "d" * 150 + ".txt", "d/b.0.TXT", "d/b.json", "c.txt"):
            (tmp_path / "file").write_bytes(name.encode() * 300)
            tar.add(tmp_path / "file", name)
        tar.add(tmp_path, "folder.d", recursive=False)
        os.symlink("file", tmp_path / "link")
        tar.add(tmp_path / "link", "c.link")
    for path in ("long-000000.tar", "odd.tar"):
        assert every([str(tmp_path / path)]) == list(read_in_order([str(tmp_path / path)]))
    assert [raw["__key__"] for raw in every([str(tmp_path / "odd.tar")])] == ["a", "d" * 150, "d/b", "c"]


def test_index_beside_the_shards_is_used(folder, monkeypatch):
    write_index(scan_shards(folder, "x", Storage()), Path(folder[0]).parent / INDEX_NAME)
    monkeypatch.setattr(indexing, "scan_shards", None)
    assert every(folder) == list(read_in_order(folder))
    assert every([folder[2], folder[0]]) == list(read_in_order([folder[2], folder[0]]))  # some of them, in another order


def test_the_command(folder, capsys, tmp_path, shards):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(shards["caption-train"][0], other)
    assert main(["data", "index", f"{tmp_path}/*.tar", f"{other}/*.tar"]) == 0
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "60 samples in 3 shards of 0.000 GB",
        "20 samples in 1 shards of 0.000 GB",
    ]
    assert read_index(tmp_path / INDEX_NAME).counts.tolist() == [20, 20, 20]
    assert main(["data", "index", *folder, f"{other}/*.tar", "--out", str(tmp_path)]) == 3
    assert "name those of one" in capsys.readouterr().err


def test_index_that_knows_some_of_the_shards(folder):
    write_index(scan_shards(folder[:2], "x", Storage()), Path(folder[0]).parent / INDEX_NAME)
    assert every(folder) == list(read_in_order(folder))


def test_what_took_long_is_kept_in_the_cache(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(indexing, "WORTH_KEEPING", 1)
    first = open_index(folder, "x", Storage())
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    with monkeypatch.context() as without:
        without.setattr(indexing, "scan_shards", None)
        again = open_index(folder, "x", Storage())
    assert again.shards == first.shards and np.array_equal(again.starts, first.starts) and again.digest == first.digest
    os.utime(folder[0], ns=(0, 0))  # written anew: read anew
    open_index(folder, "x", Storage())
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_damaged_shards_are_refused_by_name(tmp_path, shards):
    whole = Path(shards["qa-train"][0]).read_bytes()
    cases = {"text.tar": b"hello" * 500, "empty.tar": b"", "cut.tar": whole[: len(whole) // 2]}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            open_index([str(tmp_path / name)], "data.train", Storage())
    damaged = bytearray(whole)
    with tarfile.open(shards["qa-train"][0]) as tar:
        middle = tar.getmembers()[10].offset
    damaged[middle : middle + 200] = b"\xff" * 200
    (tmp_path / "inner.tar").write_bytes(damaged)
    with pytest.raises(DataError, match=r"inner.tar' is damaged at byte"):
        open_index([str(tmp_path / "inner.tar")], "data.train", Storage())


def test_a_shard_that_changed_is_refused(folder):
    write_index(scan_shards(folder, "x", Storage()), Path(folder[0]).parent / INDEX_NAME)
    dataset = open_dataset(folder, "data.train", Storage())
    data = bytearray(Path(folder[0]).read_bytes())
    Path(folder[0]).write_bytes(data[512:] + data[:512])  # of the same size
    with pytest.raises(DataError, match="does not hold at byte"):
        dataset.raw(3)
    Path(folder[1]).write_bytes(data[:2048])
    with pytest.raises(DataError, match=r"is cut short"):
        open_index(folder, "data.train", Storage())
    with pytest.raises(DataError, match=r"ends at byte"):
        dataset.raw(25)


def test_a_shard_that_was_written_anew_is_read_anew(folder, shards, caplog):
    write_index(scan_shards(folder, "x", Storage()), Path(folder[0]).parent / INDEX_NAME)
    shutil.copy(shards["caption-train"][1], folder[2])
    assert every(folder) == list(read_in_order(folder)) and "and 0 more were written after" in caplog.text


def test_a_header_that_lies_about_its_size(tmp_path):
    """The index was made of an honest shard; then a header claims gigabytes: nothing beyond the sample's place is read."""
    (path,) = write_shards(tmp_path, "s", [{"__key__": str(number), "txt": b"x" * 100} for number in range(3)], samples_per_shard=9)
    dataset = open_dataset([str(path)], "data.train", Storage())
    with tarfile.open(path) as tar:
        member = tar.getmembers()[1]
    data = bytearray(path.read_bytes())
    member.size = 8 * 2**30
    data[member.offset : member.offset + 512] = member.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"says that it has 8,589,934,592 bytes"):
        dataset.raw(1)
    assert dataset.raw(2)["txt"] == b"x" * 100


def test_an_index_of_another_make(tmp_path):
    (tmp_path / INDEX_NAME).write_bytes(b"no index")
    with pytest.raises(DataError, match=r"cannot be read as an index .* `vlm-dist data index`"):
        read_index(tmp_path / INDEX_NAME)


def test_empty_shards_are_passed_over(tmp_path, folder):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    paths = [str(tmp_path / "empty.tar"), folder[0], str(tmp_path / "empty.tar"), folder[1]]
    assert every(paths) == list(read_in_order([folder[0], folder[1]]))
