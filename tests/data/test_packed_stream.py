"""Packed and grouped rows, and mixtures: the same for every number of ranks and threads, whole epochs, resumable between any two steps."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from tests.data.test_stream import copy_without
from vlm_dist.config import DataConfig
from vlm_dist.data.lengths import Length
from vlm_dist.data.packing import choose
from vlm_dist.data.quarantine import Quarantine
from vlm_dist.data.shards import read_in_order
from vlm_dist.data.stream import merge_states, open_stream


@pytest.fixture(scope="module")
def processor(llava):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(llava)


@pytest.fixture
def stream_of(shards, processor, tmp_path):
    def make(rank=0, world_size=1, *, pack=True, train=None, epochs=None, **settings):
        settings = {"max_seq_length": 200, "shuffle_window": 16, "pack_lookahead": 6, "packing": True} | settings
        config = DataConfig(train=train or [*shards["qa-train"], *shards["caption-train"]], **settings)
        quarantine = Quarantine(tmp_path / "quarantine.jsonl", 1.0)
        batch = {"global_batch": 4, "micro_batch": 1, "rank": rank, "world_size": world_size}
        return open_stream(config, processor, quarantine, seed=3, **batch, epochs=epochs, pack=pack)

    return make


def keys(steps) -> list[list[str]]:
    return [list(itertools.chain(*step.keys)) for step in steps]


def whole_epoch(stream) -> list[list[str]]:
    return keys(itertools.islice(stream.steps(), stream.count_steps()))


@pytest.mark.parametrize("pack", [True, False])
def test_rows_do_not_depend_on_ranks_or_threads(stream_of, pack):
    expected = keys(itertools.islice(stream_of(pack=pack).steps(), 12))
    assert max(map(len, expected)) > 4 or not pack
    for world_size, workers in ((2, 0), (2, 1), (4, 3)):
        parts = [stream_of(rank, world_size, pack=pack, workers=workers).steps() for rank in range(world_size)]
        for row in expected:
            assert [key for part in parts for key in itertools.chain(*next(part).keys)] == row


@pytest.mark.parametrize("pack", [True, False])
def test_every_sample_once_an_epoch(stream_of, shards, pack):
    everything = sorted(raw["__key__"] for raw in read_in_order([*shards["qa-train"], *shards["caption-train"]]))
    stream = stream_of(pack=pack, epochs=2)
    found = whole_epoch(stream)
    assert sorted(itertools.chain(*found)) == sorted([*everything, *everything])
    assert (found[-1] and not pack) or len(found) < len(everything) // 4
    per_lane = [stream_of(rank, 4, pack=pack, epochs=2).count_steps() for rank in range(4)]
    assert max(per_lane) == len(found)


@pytest.mark.parametrize(("pack", "train"), [(True, None), (False, None), (True, "mixture")])
def test_resumed_on_other_ranks_between_any_two_steps(stream_of, shards, pack, train):
    if train:
        train = {"a": {"shards": shards["qa-train"], "weight": 3}, "b": {"shards": shards["caption-train"]}}
    whole = stream_of(pack=pack, train=train)
    expected, states = [], []
    for _ in range(14):
        expected.append(list(itertools.chain(*whole.next_step().keys)))
        states.append(json.loads(json.dumps(merge_states([whole.state()]))))
    whole.close()
    for done in (1, 4, 9):
        parts = [stream_of(rank, 2, pack=pack, train=train) for rank in range(2)]
        found, again = [], []
        for part in parts:
            part.restore(states[done - 1])
        for _ in range(4):
            found.append([key for part in parts for key in itertools.chain(*part.next_step().keys)])
            again.append(merge_states([part.state() for part in parts]))
        assert found == expected[done : done + 4]
        assert json.loads(json.dumps(again[-1])) == states[done + 3]  # what two ranks save is what one saves
        for part in parts:
            part.close()


def test_budgets_are_kept(stream_of):
    for step in itertools.islice(stream_of(max_patches=30).steps(), 10):
        for batch in step.micro_batches:
            assert batch["input_ids"].shape[1] <= 200 and "attention_mask" not in batch
            starts = int((batch["position_ids"] == 0).sum())
            pixels = batch["pixel_values"]
            assert pixels.shape[0] == 1 or pixels.numel() // (3 * 14 * 14) <= 30
            assert starts >= pixels.shape[0]
        assert step.counts.slots == step.counts.tokens


def test_unusable_samples_leave_no_trace_in_a_row(stream_of, shards, tmp_path):
    """A file that is no picture is found by its header, before the row is chosen; one that is damaged inside leaves a hole."""

    def damage(raw):
        if raw["__key__"].endswith("0000003"):
            raw["jpg"] = b"no picture"
        if raw["__key__"].endswith("0000005"):
            raw["jpg"] = raw["jpg"][: len(raw["jpg"]) // 2]
        return raw

    path = copy_without(shards["qa-train"][0], tmp_path, damage)
    stream = stream_of(train=[path], epochs=1)
    found = list(itertools.chain(*whole_epoch(stream)))
    assert len(found) == len(set(found)) == 18
    named = [json.loads(line)["key"][-1] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(named) == ["3", "5"]


def test_too_long_for_a_row(stream_of, tmp_path):
    stream = stream_of(max_seq_length=40, epochs=1, workers=0)
    found = list(itertools.chain(*whole_epoch(stream)))
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert reasons and all("more than data.max_seq_length=40" in reason for reason in reasons)
    assert len(found) + len(reasons) == 120
    cut = stream_of(max_seq_length=40, on_too_long="truncate", epochs=1)
    assert len(list(itertools.chain(*whole_epoch(cut)))) > len(found)


def test_rows_are_full_and_alike():
    """On a mix of short captions, long answers and up to four pictures: under 3 % empty, vision work within 5 % between 8 ranks."""
    generator = np.random.default_rng(0)

    def lengths(count: int) -> list[Length]:
        found = []
        while len(found) < count:
            pictures = 0 if generator.random() < 0.2 else int(generator.integers(1, 5)) if generator.random() < 0.3 else 1
            vision = sum(int(np.clip(generator.lognormal(5.6, 0.6), 64, 1280)) for _ in range(pictures))
            text = int(generator.lognormal(3.5, 0.5)) if generator.random() < 0.5 else int(generator.lognormal(5.3, 0.6))
            if vision + text + 20 <= 4096:
                found.append(Length(vision + text + 20, vision))
        return found

    filled, patches = [], []
    for lane in range(32):
        waiting, tokens, vision = lengths(64), 0, 0
        for step in range(25):
            while len(waiting) < 64:
                waiting += lengths(1)
            ratio = (vision + sum(one.patches for one in waiting)) / (tokens + sum(one.tokens for one in waiting))
            row = choose(waiting, 4096, ratio, None, f"{lane}/{step}")
            assert row[0] == 0 and len(set(row)) == len(row)
            tokens, vision = tokens + sum(waiting[i].tokens for i in row), vision + sum(waiting[i].patches for i in row)
            if step >= 10:
                filled.append(sum(waiting[i].tokens for i in row) / 4096)
                patches.append(sum(waiting[i].patches for i in row))
            waiting = [one for i, one in enumerate(waiting) if i not in set(row)]
    of_rank = np.array(patches).reshape(32, 15).reshape(8, 4, 15).sum(1)
    assert np.mean(filled) > 0.97
    assert np.mean(of_rank.max(0) / of_rank.mean(0) - 1) < 0.05


def test_grouped_rows_waste_less(stream_of):
    """One sample a row, of about the length of the others in its step."""

    def padding(stream) -> float:
        steps = list(itertools.islice(stream.steps(), 25))
        longest = [max(batch["input_ids"].shape[1] for batch in step.micro_batches) for step in steps]
        return 1 - sum(step.counts.tokens for step in steps) / sum(4 * length for length in longest)

    grouped, plain = padding(stream_of(pack=False, pack_lookahead=32)), padding(stream_of(packing=False, pack=False))
    assert grouped < 0.7 * plain
