"""Which samples share a row. Inside one lane and from numbers alone, so that it is the same for every number of ranks and workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm_dist.data.lanes import random_generator

if TYPE_CHECKING:
    from vlm_dist.data.lengths import Length

TRIES = 64
BALANCE = 0.3


def choose(waiting: Sequence[Length], limit: int, patches_a_token: float, most_patches: int | None, key: str) -> list[int]:
    """Places of the waiting samples that fill a row best; the first, which waits longest, is always among them.

    Of 64 random orders each is packed first-fit; the row wins that leaves least of `limit` tokens empty and whose vision work is
    nearest to that of an average row: a rank with the big pictures would make all others wait.

    Args:
        waiting: none longer than `limit`.
        patches_a_token: of the lane so far.
        most_patches: a row has no more, unless its first sample alone has; None: no limit.
        key: decides the random orders.
    """
    generator = random_generator(key)
    target = max(1.0, patches_a_token * limit)
    best: list[int] = []
    lowest = float("inf")
    rest = list(range(1, len(waiting)))
    for attempt in range(TRIES):
        order = rest if attempt == 0 else [rest[number] for number in generator.permutation(len(rest))]
        chosen, room, patches = [0], limit - waiting[0].tokens, waiting[0].patches
        for number in order:
            tokens, more = waiting[number]
            if tokens <= room and (most_patches is None or patches + more <= most_patches):
                chosen.append(number)
                room, patches = room - tokens, patches + more
        cost = room / limit + BALANCE * abs(patches - target) / target
        if cost < lowest:
            best, lowest = chosen, cost
        if len(chosen) == len(waiting):
            break  # all fit
    return best


def of_similar_length(waiting: Sequence[Length], key: str) -> int:
    """The place of the waiting sample at a random quantile of their lengths. With one key for all lanes the rows of a step are about
    equally long, and padding is little, without any lane knowing of another; and in the long run each sample is as likely as any."""
    by_length = sorted(range(len(waiting)), key=lambda number: (waiting[number].tokens, number))
    return by_length[int(random_generator(key).random() * len(by_length))]
