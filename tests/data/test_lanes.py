"""The order of samples, by arithmetic alone: exactly once an epoch, the same for every number of ranks, looked up and not walked to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dist.data.lanes import Lane, Order

SHAPES = st.one_of(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.just([500]),  # one giant shard
    st.just([1] * 30),  # shards of one sample
    st.just([2, 3, 5, 7, 11, 13, 17]),  # seven shards of prime sizes
)


def first_steps(order: Order, count: int) -> list[tuple[int, int]]:
    """(epoch, number) in the order of training."""
    return [order.draw(lane, step) for step in range(count) for lane in range(order.lanes)]


@given(SHAPES, st.sampled_from([1, 3, 8, 64]), st.integers(1, 50), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_sample_once_an_epoch(counts, lanes, window, seed):
    order = Order(np.array(counts), lanes, seed, window)
    total = sum(counts)
    drawn = first_steps(order, -(-3 * total // lanes))
    for epoch in range(3):
        part = drawn[epoch * total : (epoch + 1) * total]
        assert {number for number, _ in part} == {epoch}
        assert sorted(sample for _, sample in part) == list(range(total))


@given(SHAPES, st.sampled_from([2, 8]), st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_a_window_draws_from_its_own_blocks(counts, lanes, window):
    """What is fetched ahead is what is drawn."""
    order = Order(np.array(counts), lanes, 0, window)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    for lane in range(lanes):
        announced: set[int] = set()
        drawn: set[int] = set()
        for ordinal in range(min(40, 2 * sum(counts))):
            if order.begins_window(lane, ordinal):
                announced = set(order.blocks_of_window(lane, ordinal))
            _, number = order.draw(lane, ordinal)
            shard = int(np.searchsorted(firsts, number, side="right")) - 1
            begin, end = order.block_of(number, int(firsts[shard]))
            assert begin in announced and begin <= number < end
            assert announced == set(order.blocks_of_window(lane, ordinal))  # wherever in the window one asks
            drawn = drawn | {begin} if not order.begins_window(lane, ordinal) else {begin}
            if order.begins_window(lane, ordinal + 1):
                assert drawn == announced  # nothing is fetched in vain


def test_epochs_seeds_and_lanes_differ_and_repeat():
    counts = np.array([300, 200, 100])
    first = first_steps(Order(counts, 4, 0, 50), 300)
    assert first == first_steps(Order(counts, 4, 0, 50), 300)
    assert first[:600] != [(0, number) for _, number in first[600:]]
    assert first != first_steps(Order(counts, 4, 1, 50), 300) and first != first_steps(Order(counts, 4, 0, 50, "other"), 300)


def test_neighbours_of_a_shard_are_spread():
    """Samples of one shard that lie side by side, such as one class, do not come side by side."""
    order = Order(np.full(50, 200), 8, 0, 1000)
    shards = np.array([number // 200 for _, number in first_steps(order, 400)])
    distinct = [len(set(batch)) for batch in shards.reshape(-1, 32)]
    assert np.mean(distinct) > 0.85 * 50 * (1 - (1 - 1 / 50) ** 32)  # of what drawing at random would give


def test_a_mixture_keeps_its_weights_in_every_lane():
    orders = [Order(np.array([100]), 4, 0, 50, "a"), Order(np.array([7, 5]), 4, 0, 50, "b"), Order(np.array([40]), 4, 0, 50, "c")]
    weights = [5.0, 3.0, 2.0]
    lanes = [Lane(number, orders, weights, seed=0) for number in range(4)]
    drawn = [[lane.draw() for lane in lanes] for _ in range(200)]
    for place, lane in enumerate(lanes):
        for t in (10, 50, 200):
            counts = np.bincount([step[place].dataset for step in drawn[:t]], minlength=3)
            assert np.abs(counts - t * np.array([0.5, 0.3, 0.2])).max() <= 2
        assert sum(lane.counts) == 200
    small = [draw for step in drawn for draw in step if draw.dataset == 1]
    for epoch in range(15):  # the small one is walked through again and again, without replacement
        assert sorted(draw.number for draw in small if draw.epoch == epoch) == list(range(12))
    assert len({tuple(draw.dataset for draw in step) for step in drawn}) > 5  # lanes are not in step with one another


def test_the_order_of_a_seed_is_a_promise():
    """A checkpoint of an earlier version goes on with the samples that it would have had."""
    order = Order(np.array([5, 3, 4]), 2, seed=7, window=3)
    assert [number for _, number in first_steps(order, 6)] == [8, 6, 0, 4, 5, 11, 10, 2, 3, 7, 1, 9]
    lane = Lane(1, [order, Order(np.array([9]), 2, 7, 4, "b"), Order(np.array([6]), 2, 7, 4, "c")], [5.0, 3.0, 2.0], seed=7)
    assert [(draw.dataset, draw.number) for draw in (lane.draw() for _ in range(12))] == [
        (0, 6),
        (1, 3),
        (0, 4),
        (2, 4),
        (0, 11),
        (1, 6),
        (0, 2),
        (2, 1),
        (1, 5),
        (0, 7),
        (0, 9),
        (1, 4),
    ]
    two = Lane(0, lane.orders[:2], [1.0, 1.0], seed=7)
    assert [two.draw().dataset for _ in range(8)] == [1, 0, 1, 0, 1, 0, 1, 0]


def test_draws_can_be_looked_up_again_and_windows_are_announced():
    told = []
    orders = [Order(np.array([30]), 2, 0, 4), Order(np.array([50]), 2, 0, 5, "b")]
    lane = Lane(1, orders, [2.0, 1.0], 0, announce=lambda *what: told.append(what))
    drawn = [lane.draw() for _ in range(40)]
    assert [lane.again(draw.dataset, draw.ordinal) for draw in drawn] == drawn
    begun = [draw for draw in drawn if orders[draw.dataset].begins_window(1, draw.ordinal)]
    assert told == [(1, draw.dataset, draw.ordinal) for draw in begun]
    for number in (0, 1):
        assert [draw.ordinal for draw in drawn if draw.dataset == number] == list(range(lane.counts[number]))
    told.clear()
    later = Lane(1, orders[:1], [1.0], 0, announce=lambda *what: told.append(what), counts=[2])  # continued within a window
    assert [later.draw().ordinal for _ in range(4)] == [2, 3, 4, 5] and told == [(1, 0, 2), (1, 0, 4)]
    with pytest.raises(ValueError, match="zip"):
        Lane(0, orders, [1.0], 0).draw()


def test_lanes_end_with_their_epochs():
    order = Order(np.array([10]), 4, 0, 5)
    lanes = [Lane(number, [order], [1.0], 0, epochs=2) for number in range(4)]
    rows = [[lane.draw() for lane in lanes] for _ in range(6)]
    assert [sum(draw is not None for draw in row) for row in rows] == [4, 4, 4, 4, 4, 0]


def test_a_hundred_million_samples():
    order = Order(np.full(10_000, 10_000), 1024, 0, 2000)
    epoch, number = order.draw(1000, 50_000)
    assert epoch == 0 and 0 <= number < 10**8
    assert len(order.blocks_of_window(1000, 50_000)) >= 2000 // 64
