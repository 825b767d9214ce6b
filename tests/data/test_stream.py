"""Shards and steps: the order depends on data, seed and global batch alone; nothing is lost without a word."""

from __future__ import annotations

import itertools
import json
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vlm_dist.config import DataConfig
from vlm_dist.data.heldout import read_heldout
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.shards import find_paths, read_in_order, write_shards
from vlm_dist.data.stream import merge_states, open_stream
from vlm_dist.errors import DataError


@pytest.fixture
def processor(llava):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(llava)


def stream_of(shards, processor, tmp_path, rank=0, world_size=1, global_batch=4, micro_batch=2, **settings):
    config = DataConfig(train=shards, max_seq_length=256, shuffle_window=16, **settings)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", config.max_bad_fraction)
    return open_stream(
        config, processor, quarantine, seed=5, global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world_size
    )


def rows(step) -> list[list[int]]:
    """The real tokens of each sample of a step, padding off."""
    found = []
    for batch in step.micro_batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            found.append(ids[mask.bool()].tolist())
    return found


def copy_without(source: str, out: Path, change) -> str:
    """A copy of a shard whose samples went through change(raw) -> raw or None."""
    samples = [change(dict(raw)) for raw in read_in_order([source])]
    kept = [{name: value for name, value in raw.items() if name not in ("__url__", "__local_path__")} for raw in samples if raw]
    return str(write_shards(out, "changed", kept, samples_per_shard=10_000)[0])


def test_paths_braces_and_globs(tmp_path, shards):
    for number, path in enumerate(shards["qa-train"]):
        shutil.copy(path, tmp_path / f"s-{number:03d}.tar")
    everything = [str(tmp_path / f"s-{number:03d}.tar") for number in range(3)]
    assert find_paths([f"{tmp_path}/s-*.tar"], "x") == everything
    assert find_paths([f"{tmp_path}/s-{{000..002}}.tar"], "x") == everything
    assert find_paths([everything[1], f"file://{everything[0]}"], "x") == [everything[1], everything[0]]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("pipe:cat x.tar", "would run a command"),
        ("gs://bucket/x.tar", "gcsfs, which is not installed; pip install gcsfs"),
        ("carrier-pigeon://x.tar", "Protocol not known"),
        ("missing-*.tar", "no shard matches"),
        ("missing.tar", "no shard matches"),
    ],
)
def test_what_is_no_shard_is_refused(pattern, words):
    with pytest.raises(DataError, match=words):
        find_paths([pattern], "data.train")


def test_a_hole_in_a_pattern_is_named(tmp_path, shards):
    for number in (0, 2):
        shutil.copy(shards["qa-train"][0], tmp_path / f"s-{number}.tar")
    with pytest.raises(DataError, match=r"names '.*s-1.tar', which is not there"):
        find_paths([f"{tmp_path}/s-{{0..2}}.tar"], "data.train")


def test_steps_do_not_depend_on_ranks_or_micro_batches(tmp_path, shards, processor):
    whole = [rows(step) for step, _ in zip(stream_of(shards["qa-train"], processor, tmp_path).steps(), range(20), strict=False)]
    for world_size, micro_batch in ((2, 1), (2, 2), (4, 1), (1, 4)):
        parts = [
            stream_of(shards["qa-train"], processor, tmp_path, rank, world_size, micro_batch=micro_batch).steps()
            for rank in range(world_size)
        ]
        for expected in whole:
            assert [row for part in parts for row in rows(next(part))] == expected


def test_restoring_continues_exactly(tmp_path, shards, processor):
    whole = stream_of(shards["qa-train"], processor, tmp_path)
    expected, states = [], []
    for _ in range(40):  # 60 samples: more than two epochs
        expected.append(rows(whole.next_step()))
        states.append(json.loads(json.dumps(merge_states([whole.state()]))))
    whole.close()
    for steps in (3, 15, 31):
        resumed = stream_of(shards["qa-train"], processor, tmp_path)
        resumed.restore(states[steps - 1])
        assert [rows(resumed.next_step()) for _ in range(5)] == expected[steps : steps + 5]
        resumed.close()


def test_counts_of_a_step(tmp_path, shards, processor):
    step = next(stream_of(shards["qa-train"], processor, tmp_path).steps())
    assert step.counts.samples == 4 and len(step.micro_batches) == 2
    assert step.counts.tokens == sum(int(batch["attention_mask"].sum()) for batch in step.micro_batches)
    assert step.counts.labels == sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in step.micro_batches)


def test_bad_samples_are_skipped_counted_and_named(tmp_path, shards, processor):
    def damage(raw):
        if raw["__key__"].endswith("0000003"):
            raw["jpg"] = b"no picture"
        if raw["__key__"].endswith("0000007"):
            del raw["json"]
        return raw

    path = copy_without(shards["qa-train"][0], tmp_path, damage)
    stream = stream_of([path], processor, tmp_path)
    steps = [step for step, _ in zip(stream.steps(), range(10), strict=False)]  # two epochs of 20
    assert sum(step.counts.samples for step in steps) == 2 * 18
    named = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["key"][-1] for row in named) == ["3", "7"]  # once each, although read twice
    assert all(row["shard"] == path and row["reason"] for row in named)


def test_too_many_bad_samples_stop_the_run(tmp_path, shards, processor):
    path = copy_without(shards["qa-train"][0], tmp_path, lambda raw: {**raw, "jpg": b"no picture"})
    stream = stream_of([path], processor, tmp_path, max_bad_fraction=0.01)
    with pytest.raises(DataError, match=r"unusable, more than data\.max_bad_fraction=0\.01"):
        for _ in range(10):
            stream.next_step()


def test_nothing_usable_stops_early(tmp_path, shards, processor):
    path = copy_without(shards["qa-train"][0], tmp_path, lambda raw: {**raw, "jpg": b"no picture"})
    stream = stream_of([path], processor, tmp_path, max_bad_fraction=1)
    with pytest.raises(DataError, match="none of the first 50 samples is usable"):
        for _ in range(20):
            stream.next_step()


def test_a_micro_batch_without_a_picture_gets_a_blank_row(tmp_path, shards, processor):
    def no_picture(raw):
        record = json.loads(raw["json"])
        record["messages"] = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "red"}]
        return {"__key__": raw["__key__"], "json": json.dumps(record).encode()}

    step = next(stream_of([copy_without(shards["qa-train"][0], tmp_path, no_picture)], processor, tmp_path).steps())
    for batch in step.micro_batches:
        assert len(batch["input_ids"]) == 3 and len(batch["pixel_values"]) == 1
        assert (batch["labels"][2] == -100).all()
    assert step.counts.samples == 4


def test_threads_copy_an_encoder_that_is_written_into(tmp_path, shards, processor):
    """The stream's own keeps what it works out, the blank row among it, while threads begin."""
    stream, ended = stream_of(shards["qa-train"], processor, tmp_path), threading.Event()

    def write() -> None:
        for number in itertools.cycle(range(1000)):
            setattr(stream.encoder, f"found_{number}", number)
            if number == 999:
                for one in range(1000):
                    delattr(stream.encoder, f"found_{one}")
            if ended.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(5):
            with ThreadPoolExecutor(4) as pool:
                copies = list(pool.map(lambda _: (threading.get_ident(), stream.preparer.encoder), range(16)))
            assert len({id(encoder) for _, encoder in copies}) == len({thread for thread, _ in copies})
    finally:
        ended.set()
        writer.join()


def test_empty_data_set(tmp_path, processor):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(DataError, match="hold no sample"):
        stream_of([str(tmp_path / "empty.tar")], processor, tmp_path)


def test_changed_data_is_not_continued(tmp_path, shards, processor):
    state = merge_states([stream_of(shards["qa-train"], processor, tmp_path).state()])
    with pytest.raises(DataError, match="not the shards that the run began with"):
        stream_of(shards["qa-train"][:2], processor, tmp_path).restore(state)
    with pytest.raises(DataError, match=r"data\.packing: True now, False when the run began"):
        stream_of(shards["qa-train"], processor, tmp_path, packing=True).restore(state)
    with pytest.raises(DataError, match="8 now, 4 when the run began"):
        stream_of(shards["qa-train"], processor, tmp_path, global_batch=8).restore(state)


def test_heldout_is_spread_over_the_shards(tmp_path, shards):
    config = DataConfig(train="x", heldout=[*shards["qa-heldout"], *shards["reading-heldout"]])
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.01)
    assert len(read_heldout(config, None, quarantine)) == 24
    assert [sample.key.split("-")[0] for sample in read_heldout(config, 4, quarantine)] == ["qa", "qa", "reading", "reading"]


def test_tensors_are_of_the_processors_own_making(tmp_path, shards, processor):
    batch = next(stream_of(shards["qa-train"], processor, tmp_path).steps()).micro_batches[0]
    assert batch["pixel_values"].dtype == torch.float32 and batch["input_ids"].dtype == torch.int64
