"""The vision tower's work shared out over the ranks that share a row: each computes its part of the pictures, the features are gathered
behind the projector, and their gradients go back to where the pictures were computed, added up over the ranks.

What is shared out: pictures or tiles where the tower takes them all in one size, [P, 3, H, W]; where it takes the patches of pictures of
any size in one row, [patches, ...] with a grid [P, 3] of (steps of time, rows, columns), whole pictures and single steps of videos.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_dist.families import Family
from vlm_dist.models.ahead import of_tower
from vlm_dist.models.sequence import SequenceCut, cut_rows

BY_ALL = "engine.sequence_parallel: each rank of a group runs the vision tower on all pictures of its row"


def share_rows(model: Any, family: Family, cut: SequenceCut, *, cached: bool = False) -> str:
    """Cut a model's rows, and share out its tower's work, inside `cut.cutting()`; call it before kernels are put in.

    Args:
        cached: what the tower gives is kept (data.cache_features), and what is known differs between ranks.

    Returns:
        Why pictures are not shared out, in words; empty: they are.
    """
    cut_rows(model, cut)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tower = base.get_submodule(family.vision)
    if cached:
        return f"{BY_ALL} that it does not know yet (data.cache_features)"
    if tower.config.model_type == "pixtral":
        return f"{BY_ALL}: Pixtral's lets them follow one another in one row"
    by_grid = family.projector[0].startswith(f"{family.vision}.")
    by_length = getattr(tower.config, "pooling_kernel_size", None)
    shared = _Grids(tower, cut) if by_grid else _Pooled(cut, by_length**2) if by_length else _Rows(cut)
    last = tower if by_grid else base.get_submodule(family.projector[0])
    tower.register_forward_pre_hook(shared.before, with_kwargs=True)
    last.register_forward_hook(shared.after)
    return ""


class _Rows:
    """Pictures that are rows of a tensor."""

    def __init__(self, cut: SequenceCut):
        self.cut, self._whole = cut, 0

    def before(self, _: Any, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        whole = len(named["pixel_values"] if "pixel_values" in named else given[0])
        self._whole = whole if self.cut.is_on else 0
        if not self._whole:
            return given, named
        share = -(-whole // self.cut.number)
        first = min(self.cut.part * share, whole - 1)

        def rows(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.ndim or len(value) != whole:
                return value
            mine = value[first : first + share]  # where there are too few, the last one is computed again
            return torch.cat([mine, mine[-1:].expand(share - len(mine), *mine.shape[1:])]) if len(mine) < share else mine

        return tuple(rows(value) for value in given), {name: rows(value) for name, value in named.items()}

    def after(self, _: Any, __: tuple, features: torch.Tensor) -> torch.Tensor | None:
        whole, self._whole = self._whole, 0
        return gather(features, [len(features)] * self.cut.number, self.cut)[:whole] if whole else None


class _Pooled(_Rows):
    """Pictures that are rows of a tensor filled up to one length, and give features as their own patches are many (Gemma 4).

    Args:
        patches: that become one feature.
    """

    def __init__(self, cut: SequenceCut, patches: int):
        super().__init__(cut)
        self.patches, self._lengths = patches, []

    def before(self, module: Any, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given, named_here = super().before(module, given, named)
        if self._whole:
            counts = (named["pixel_position_ids"] != -1).all(-1).sum(-1) // self.patches
            share = -(-self._whole // self.cut.number)
            self._lengths = [int(counts[part * share : (part + 1) * share].sum()) for part in range(self.cut.number)]
        return given, named_here

    def after(self, _: Any, __: tuple, features: torch.Tensor) -> torch.Tensor | None:
        whole, self._whole = self._whole, 0
        return gather(features, self._lengths, self.cut) if whole else None


class _Grids:
    """Pictures of any size in one row of patches."""

    def __init__(self, tower: Any, cut: SequenceCut):
        self.tower, self.cut, self._lengths = tower, cut, []

    def before(self, _: Any, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._lengths = []
        if not self.cut.is_on or not len(named["grid_thw"]):
            return given, named
        (patches, *others), grid = given, named["grid_thw"]
        steps = grid.repeat_interleave(grid[:, 0], 0)  # [steps of all, 3]
        steps[:, 0] = 1
        sizes = steps.prod(1).tolist()
        bounds = shares(sizes, self.cut.number)
        begins = [sum(sizes[:first]) for first, _ in bounds]
        self._lengths = [sum(sizes[first:last]) // self.tower.spatial_merge_size**2 for first, last in bounds]
        part = self.cut.part
        if self.cut.group is None:  # nothing is sent: a plan counts the rank with most to compute
            part = max(range(len(bounds)), key=lambda one: self._lengths[one])
        first, last = bounds[part]
        start, length = begins[part], sum(sizes[first:last])
        if not length:  # more ranks than there is to share out: the same number of calls everywhere
            first, last, start, length = 0, 1, 0, sizes[0]
        mine = steps[first:last]
        known = {name: value for name, value in of_tower(self.tower, mine).items() if name in named}
        known = {name: value.to(named[name].device) if isinstance(value, torch.Tensor) else value for name, value in known.items()}
        return (patches[start : start + length], *others), named | known | {"grid_thw": mine}

    def after(self, _: Any, __: tuple, found: Any) -> Any:
        lengths, self._lengths = self._lengths, []
        if not lengths:
            return None
        found.pooler_output = gather(found.pooler_output, lengths, self.cut)
        if getattr(found, "deepstack_features", None):
            found.deepstack_features = [gather(one, lengths, self.cut) for one in found.deepstack_features]
        return found


def shares(sizes: list[int], number: int) -> list[tuple[int, int]]:
    """Neighbours to each of `number` ranks, [first, last) of each, whose sums are about equal; none to some where there are too few."""
    whole, done, first, found = sum(sizes), 0, 0, []
    for part in range(number):
        last, aim = first, whole * (part + 1) / number
        while last < len(sizes) and (part == number - 1 or done + sizes[last] / 2 <= aim):
            done, last = done + sizes[last], last + 1
        found.append((first, last))
        first = last
    return found


def gather(mine: torch.Tensor, lengths: list[int], cut: SequenceCut) -> torch.Tensor:
    """[length of this rank's share, ...] -> [sum of all lengths, ...]; gradients of all ranks are added up for whom they belong to."""
    return _Gather.apply(mine, lengths, cut)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, lengths: list[int], cut: SequenceCut) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.lengths, ctx.cut, ctx.own = lengths, cut, len(mine)
        block = mine.new_zeros(max(lengths), *mine.shape[1:])
        block[: lengths[cut.part]] = mine[: lengths[cut.part]]
        blocks = cut.gathered(block)
        return torch.cat([one[:length] for one, length in zip(blocks, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        lengths, cut = ctx.lengths, ctx.cut
        blocks = gradient.new_zeros(cut.number, max(lengths), *gradient.shape[1:])
        for block, part in zip(blocks, gradient.split(lengths), strict=True):
            block[: len(part)] = part
        own = gradient.new_zeros(ctx.own, *gradient.shape[1:])
        own[: lengths[cut.part]] = cut.exchanged(blocks).sum(0)[: lengths[cut.part]]
        return own, None, None
