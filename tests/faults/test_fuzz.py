"""Bytes that nobody has thought of, in each file that is read: nothing but an error of ours, of one kind, ever leaves.

FUZZ_TRIES=20000 pytest tests/faults/test_fuzz.py        some minutes each; what the suite runs is a small part
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.checkpoints.test_snapshot import advance, engine
from tests.conftest import write_config
from vlm_dist import load_config, train
from vlm_dist.checkpoints.form import find_checkpoints, newest_good_checkpoint, verify_checkpoint, write_checkpoint
from vlm_dist.checkpoints.snapshot import load_checkpoint, take_snapshot
from vlm_dist.config_load import dump_config, parse_config
from vlm_dist.data.dataset import open_dataset
from vlm_dist.data.index import scan_shards
from vlm_dist.data.index_file import Index, read_index, write_index
from vlm_dist.data.samples import parse_sample
from vlm_dist.data.storage import Storage
from vlm_dist.data.tar import BLOCK
from vlm_dist.errors import BadSample, CheckpointError, ConfigError, DataError, UserError

TRIES = int(os.environ.get("FUZZ_TRIES", "100"))
ODD = [
    None, True, False, -1, 0, 1, 2**31, 2**48 + 1, 2**63, -(2**63), 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "x", "0", "1e5",
    "a b", "\ud800", "\x00", "../x", "/", "~", "a" * 300, "*.tar", "http://x/y.tar", "pipe:cat x", "{0..9999999999}.tar", "[", "${x}",
    "auto", [], [[]], ["x"], [1, "x"], [None], {}, {"a": 1}, {"x": ["y.tar"]}, {"": None},
]  # fmt: skip
DEEP = "[" * 100_000


def fuzz(tries: float, strategy: st.SearchStrategy, check: Callable[[Any], object]) -> None:
    """So many of FUZZ_TRIES; what the suite runs is the same every time."""
    number = max(5, round(TRIES * tries))

    @settings(max_examples=number, deadline=None, database=None, derandomize=TRIES <= 100, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def once(value: Any) -> None:
        check(value)

    once()


@st.composite
def damaged(draw: Any, good: bytes, most: int = 3) -> bytes:
    """The bytes after some accidents."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, most))):
        at, length = draw(st.integers(0, max(0, len(data) - 1))), draw(st.sampled_from([1, 2, 8, 40, BLOCK, 3 * BLOCK]))
        kind = draw(st.sampled_from(["flip", "put", "cut", "insert", "repeat", "drop", "zero", "move"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind in ("put", "insert"):
            data[at : at + length * (kind == "put")] = draw(st.binary(max_size=length))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + length]
        elif kind == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            to = at if kind == "repeat" else draw(st.integers(0, len(data)))
            data[to:to] = data[at : at + length]
    return bytes(data)


@st.composite
def odd_tree(draw: Any, tree: Any, most: int = 2) -> Any:
    """The tree with values that are others, gone, or more."""
    root = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(1, most))):
        node: Any = root
        key: Any = 0
        while isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 5)):
            node = node[key]
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "nudge"]))
        if kind == "remove" and node is not root:
            del node[key]
        elif kind == "add" and isinstance(node, dict):
            node[draw(st.sampled_from(["x", "0", "", "step", "99", "\ud800"]))] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif kind == "nudge" and isinstance(node[key], int | float):
            node[key] += draw(st.sampled_from([-1, 1, 0.5, 1000]))
        else:
            node[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return root[0]


CONFIG = {
    "name": "a", "model": {"name": "m"}, "lora": {"r": 4}, "data": {"train": "x.tar", "heldout": ["y.tar"]},
    "training": {"steps": 1, "global_batch": 1},
}  # fmt: skip
WHOLE_CONFIG = parse_config(json.dumps(CONFIG)).model_dump(mode="json")
CONFIG_TEXT = "".join(f"{key}: {json.dumps(value)}\n" for key, value in CONFIG.items()).encode()


def check_config(text: str) -> None:
    try:
        config = parse_config(text)
    except ConfigError as error:
        assert str(error) and len(str(error)) < 20_000
        return
    assert dump_config(parse_config(dump_config(config))) == dump_config(config)


def test_text_of_a_configuration():
    texts = damaged(CONFIG_TEXT, 5).map(lambda data: data.decode("utf-8", "replace"))
    fuzz(1, odd_tree(WHOLE_CONFIG, 3).map(json.dumps), check_config)
    fuzz(1, texts, check_config)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    """A small one, with a long name, a picture and a sample in JSON."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    record = {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a box"}]}
    path = tmp_path_factory.mktemp("fuzz") / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for name, content in [
            ("a.png", picture.getvalue()), ("a.txt", b"a box"), ("b.png", picture.getvalue()), ("b.json", json.dumps(record).encode()),
            (f"{'long' * 40}.txt", b"words"),
        ]:  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def with_right_checksums(data: bytes) -> bytes:
    """As an archiver that lies would have written it."""
    made = bytearray(data)
    for at in range(0, len(made) - BLOCK + 1, BLOCK):
        if made[at + 257 : at + 262] == b"ustar":
            made[at + 148 : at + 156] = b" " * 8
            made[at + 148 : at + 156] = b"%06o\0 " % sum(made[at : at + BLOCK])
    return bytes(made)


def read_all(path: Path) -> int:
    """Every sample of a shard, as training reads it."""
    usable = 0
    dataset = open_dataset([str(path)], "data.train", Storage())
    for number in range(len(dataset.index)):
        try:
            parse_sample(dataset.raw(number), max_image_pixels=10**6, caption_prompt="x")
            usable += 1
        except BadSample as reason:
            assert str(reason)
    return usable


@pytest.mark.parametrize("is_repaired", [False, True])
def test_bytes_of_a_shard(shard, tmp_path, is_repaired):
    good, path, counts = shard.read_bytes(), tmp_path / "x.tar", {"read": 0, "refused": 0}
    assert read_all(shard) == 2

    def check(data: bytes) -> None:
        path.write_bytes(with_right_checksums(data) if is_repaired else data)
        try:
            read_all(path)
            counts["read"] += 1
        except DataError as error:
            assert str(path) in str(error)
            counts["refused"] += 1

    fuzz(1, damaged(good), check)
    assert min(counts.values()) > 0


def check_index(path: Path) -> bool:
    try:
        index = read_index(path)
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return False
    for number in range(len(index)):
        place = index.place(number)
        size = int(index.sizes[index.shards.index(place.shard)])
        assert 0 <= place.start < place.start + place.length <= size
    return True


def test_bytes_of_an_index(shard, tmp_path):
    write_index(scan_shards([str(shard)], "x", Storage()), tmp_path / "good")
    good = (tmp_path / "good").read_bytes()

    def check(data: bytes) -> None:
        (tmp_path / "index").write_bytes(data)
        check_index(tmp_path / "index")

    fuzz(2, damaged(good), check)


NUMBERS = st.lists(st.sampled_from([0, 1, 2, 3, 5, 9, 20, 100, 2**31, 2**32 - 1, -1, 2**62]), max_size=4)


def test_numbers_of_an_index(tmp_path):
    """With the right checksum."""
    kinds = st.tuples(*(st.sampled_from([("int64", "uint32"), ("uint32", "int64"), ("float32", "uint8"), ("int64", "int8")]) for _ in "ab"))

    def check(made: tuple[tuple[list[int], ...], Any, list[str]]) -> None:
        columns, kinds, names = made
        wanted = [kinds[0][0], kinds[0][0], kinds[0][1], kinds[0][1]]
        with np.errstate(all="ignore"):
            arrays = [np.array(column, "float64").astype(kind) for column, kind in zip(columns, wanted, strict=True)]
        write_index(Index(names, *arrays), tmp_path / "index")
        check_index(tmp_path / "index")

    names = st.lists(st.sampled_from(["a.tar", "b.tar", ""]), max_size=3, unique=True)
    fuzz(2, st.tuples(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), kinds, names), check)


PROGRESS = {"step": 3, "samples": 6, "tokens": 60, "label_tokens": 9, "wall_s": 1.5, "productive_s": 1.0, "data_step": 3, "updates": 3}
LANES = {"0": {"counts": [3]}, "1": {"counts": [3]}}
STATE = {
    "base_fingerprint": "base", "progress": PROGRESS, "health": {"skipped": 0, "rollbacks": 0, "losses": [1.0, 0.5]},
    "data": {"step": 3, "global_batch": 2, "packing": False, "digests": {"data": "x"}, "lanes": LANES},
    "patience": {"best": None, "since": 0}, "prompts": [None], "scores": None,
    "loss_scale": {"used": True, "value": 65536.0, "good": 1, "overflows": 1, "history": [[1, 65536.0]]},
}  # fmt: skip


def vouch(path: Path) -> None:
    """A manifest that bears out the files as they are."""
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir() if file.name != "MANIFEST.json"}
    (path / "MANIFEST.json").write_text(json.dumps({"version": 1, "sha256": files}))


class Continued:
    """A checkpoint of a real engine, spoiled and continued from as often as one likes."""

    def __init__(self, folder: Path):
        self.folder, self.engine = folder, engine()
        advance(self.engine, 0, 3)
        self.path = write_checkpoint(folder, 3, take_snapshot(self.engine, keep=True), STATE)
        self.good = {file.name: file.read_bytes() for file in self.path.iterdir()}
        self.counts = {"continued": 0, "refused": 0}

    def try_with(self, name: str, content: bytes, *, is_vouched_for: bool) -> None:
        for each, before in self.good.items():
            (self.path / each).write_bytes(content if each == name else before)
        if is_vouched_for:
            vouch(self.path)
        verify_checkpoint(self.path)
        try:
            found = newest_good_checkpoint(self.folder)
            assert found is not None
            load_checkpoint(found, self.engine, "base")
            self.counts["continued"] += 1
        except CheckpointError as error:
            assert str(self.folder) in str(error)
            self.counts["refused"] += 1
            return
        advance(self.engine, 3, 1)


@pytest.fixture
def continued(tmp_path) -> Continued:
    return Continued(tmp_path / "checkpoints")


@pytest.mark.parametrize("is_vouched_for", [False, True])
def test_bytes_of_a_checkpoint(continued, is_vouched_for):
    for name, good in sorted(continued.good.items()):
        try_with = partial(continued.try_with, name, is_vouched_for=is_vouched_for and name != "MANIFEST.json")
        try_with(DEEP.encode())
        fuzz(0.3, damaged(good), try_with)


def test_contents_of_a_checkpoint(continued):
    """Files that are whole and vouched for, and say something else: JSON, and the head of safetensors."""
    for name, good in sorted(continued.good.items()):
        is_json = name.endswith(".json")
        end = len(good) if is_json else 8 + int.from_bytes(good[:8], "little")

        def check(tree: Any, name: str = name, rest: bytes = good[end:]) -> None:
            made = json.dumps(tree).encode()
            length = b"" if name.endswith(".json") else len(made).to_bytes(8, "little")
            continued.try_with(name, length + made + rest, is_vouched_for=name != "MANIFEST.json")

        fuzz(1, odd_tree(json.loads(good[0 if is_json else 8 : end]), 3), check)
    assert continued.counts["continued"] > 0 and continued.counts["refused"] > 0


def test_tensors_of_a_checkpoint(continued):
    """Of other shapes, types and names, or fewer of them."""
    from safetensors.torch import load, save

    kinds = st.sampled_from([torch.int8, torch.float16, torch.float64, torch.bool, torch.bfloat16, torch.float8_e4m3fn])
    for name in ("model.safetensors", "optimizer.safetensors"):
        good = load(continued.good[name])

        def check(changes: list[Any], good: dict = good, name: str = name) -> None:
            made = dict(good)
            for key, how, kind in changes:
                tensor = made.pop(key, None)
                if tensor is None or how == "gone":
                    continue
                other = {
                    "shape": tensor.flatten()[:1],
                    "scalar": torch.tensor(1.0),
                    "nan": torch.full_like(tensor, float("nan"), dtype=torch.float32),
                    "type": tensor.to(kind),
                }
                made[key + "x" if how == "name" else key] = other.get(how, tensor)
            continued.try_with(name, save(made), is_vouched_for=True)

        change = st.tuples(st.sampled_from(sorted(good)), st.sampled_from(["type", "gone", "shape", "name", "scalar", "nan"]), kinds)
        fuzz(1, st.lists(change, min_size=1, max_size=3), check)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_states_that_a_run_continues_from(tmp_path, shards, llava):
    """The whole way of a start: a checkpoint's state.json is spoiled and vouched for, and the run is started again."""
    values = {
        "name": "tiny", "output_dir": str(tmp_path), "model": {"name": llava}, "lora": {"r": 4}, "log": {"wandb": "disabled"},
        "data": {"train": shards["qa-train"], "max_seq_length": 256, "packing": True}, "training": {"steps": 3, "global_batch": 2},
        "checkpoint": {"save_every": 2},
    }  # fmt: skip
    config, run = load_config(write_config(values, tmp_path)), tmp_path / "tiny"
    train(config)
    shutil.rmtree(run / "adapter")
    (run / "summary.json").unlink()
    for later in find_checkpoints(run / "checkpoints")[:-1]:
        shutil.rmtree(later)
    shutil.copytree(run, tmp_path / "kept")
    state = json.loads((find_checkpoints(run / "checkpoints")[0] / "state.json").read_text())

    def check(tree: Any) -> None:
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "kept", run)
        (path := find_checkpoints(run / "checkpoints")[0]).joinpath("state.json").write_text(json.dumps(tree))
        vouch(path)
        try:
            assert train(config)["step"] == 3
        except UserError as error:
            assert str(error)

    fuzz(0.05, odd_tree(state, 2), check)
