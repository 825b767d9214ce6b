"""The order of samples, by arithmetic alone: exactly once an epoch, the same for every number of ranks, looked up and not walked to."""

from __future__ import annotations

import numpy as np
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
        for ordinal in range(min(40, 2 * sum(counts))):
            if order.begins_window(lane, ordinal):
                announced = set(order.blocks_of_window(lane, ordinal))
            _, number = order.draw(lane, ordinal)
            shard = int(np.searchsorted(firsts, number, side="right")) - 1
            begin, end = order.block_of(number, int(firsts[shard]))
            assert begin in announced and begin <= number < end


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
