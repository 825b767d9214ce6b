"""What loading at ZeRO stage 3 takes of the host's memory, in two real processes."""

from __future__ import annotations

import pytest

from scripts.bench.loading import in_ranks, make_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_two_ranks_hold_half_a_copy_each(tmp_path):
    """Each rank keeps its share: together one copy, and never two. (docs/benchmarks/loading.json has the size of the issue.)"""
    size = make_checkpoint(tmp_path, 200)
    found = in_ranks(tmp_path, 2, 3, False)
    assert 0.45 < sum(rank["peak"] for rank in found) / (2 * size) < 0.65
