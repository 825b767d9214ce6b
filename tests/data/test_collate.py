"""Batches number by number: where each token, label, position and picture stands."""

from __future__ import annotations

import pytest
import torch

from vlm_dist.data import collate as collating
from vlm_dist.data.collate import collate, collate_packed
from vlm_dist.data.encode import IGNORED, Encoded

PAD = 99


def encoded(*ids: int, **inputs: torch.Tensor) -> Encoded:
    """A sample whose first token is not supervised; a label is its token plus 100, so that no mix-up passes."""
    labels = torch.tensor([[IGNORED, *(number + 100 for number in ids[1:])]])
    return Encoded(str(ids[0]), {"input_ids": torch.tensor([ids]), **inputs}, labels, torch.zeros(len(ids), dtype=torch.bool))


def pixels(number: int, value: float, *size: int) -> torch.Tensor:
    return torch.full((number, 3, *size), value)


LONG = encoded(1, 2, 3, 4, mm_token_type_ids=torch.tensor([[0, 1, 1, 0]]), pixel_values=pixels(1, 1.0, 2, 4))
SHORT = encoded(5, 6, pixel_values=pixels(2, 2.0, 3, 2))
BLIND = encoded(7, 8, 9)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded(side):
    def padded(row: list[int], value: int) -> list[int]:
        missing = [value] * (4 - len(row))
        return row + missing if side == "right" else missing + row

    batch = collate([LONG, SHORT, BLIND], PAD, side)
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "mm_token_type_ids", "pixel_values"}
    assert batch["input_ids"].tolist() == [padded(row, PAD) for row in ([1, 2, 3, 4], [5, 6], [7, 8, 9])]
    assert batch["attention_mask"].tolist() == [padded([1] * length, 0) for length in (4, 2, 3)]
    assert batch["labels"].tolist() == [padded([-100, *row], IGNORED) for row in ([102, 103, 104], [106], [108, 109])]
    assert batch["mm_token_type_ids"].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert collate([SHORT], PAD)["input_ids"].tolist() == [[5, 6]]
    short = encoded(5, 6, mm_token_type_ids=torch.tensor([[1, 1]]))
    assert collate([short, BLIND], PAD)["mm_token_type_ids"].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert collate([LONG, SHORT], PAD)["input_ids"].tolist() == collate([LONG, SHORT], PAD, "right")["input_ids"].tolist()


def test_pictures_of_a_batch_come_in_one_run():
    pictures = collate([LONG, SHORT, BLIND], PAD)["pixel_values"]
    assert pictures.shape == (3, 3, 3, 4) == collate_packed([[LONG, BLIND], [SHORT]], PAD)["pixel_values"].shape
    assert (pictures[0, :, :2] == 1).all() and (pictures[0, :, 2:] == 0).all()  # 2 x 4
    assert (pictures[1:, :, :, :2] == 2).all() and (pictures[1:, :, :, 2:] == 0).all()  # 3 x 2


def test_cross_attention_has_a_row_of_pictures_for_every_sample():
    """[1, L, pictures, tiles] masks are padded like tokens; who has no picture gets a blank row."""
    mask = torch.arange(1, 7).view(1, 3, 1, 2)
    seeing = encoded(1, 2, 3, cross_attention_mask=mask, pixel_values=torch.ones(1, 1, 2, 3, 2, 2))
    for side in ("right", "left"):
        batch = collate([seeing, LONG_BLIND], PAD, side)
        row = [*mask[0].tolist(), [[0, 0]]] if side == "right" else [[[0, 0]], *mask[0].tolist()]
        assert batch["cross_attention_mask"].tolist() == [row, [[[0, 0]]] * 4]
        assert batch["pixel_values"].shape == (2, 1, 2, 3, 2, 2)
        assert batch["pixel_values"][0].eq(1).all() and batch["pixel_values"][1].eq(0).all()


LONG_BLIND = encoded(4, 5, 6, 7)


def test_packed():
    """Positions begin anew with each sample and with the padding; a sample's first token is nobody's label."""
    supervised = encoded(7, 8, 9)
    supervised.labels = torch.tensor([[107, 108, 109]])
    batch = collate_packed([[SHORT, LONG], [supervised]], PAD)
    assert batch.keys() == {"input_ids", "labels", "position_ids", "mm_token_type_ids", "pixel_values"}
    assert batch["input_ids"].tolist() == [[5, 6, 1, 2, 3, 4], [7, 8, 9, PAD, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 106, -100, 102, 103, 104], [-100, 108, 109, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2]]
    assert batch["mm_token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0], [0] * 6]
    assert batch["mm_token_type_ids"].dtype == batch["input_ids"].dtype == torch.int64
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [2, 2, 1]


def test_packed_with_positions_in_four_rows():
    def positions(sample: Encoded) -> torch.Tensor:
        return torch.stack([torch.arange(sample.length) * (10**row) for row in range(4)])

    found = collate_packed([[SHORT, BLIND], [LONG]], PAD, positions)["position_ids"]
    assert found.shape == (4, 2, 5)
    assert found[2].tolist() == [[0, 100, 0, 100, 200], [0, 100, 200, 300, 0]]
    assert found[0].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]


def test_nothing_is_copied_into_a_batch_of_equals():
    """Pictures of one size are put together as they are, and a packed row without gaps has no padding."""
    batch = collate_packed([[SHORT, SHORT], [LONG]], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 5, 6], [1, 2, 3, 4]] and batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_memory_that_torch_did_not_allocate_holds_every_type(dtype, rows, monkeypatch):
    monkeypatch.setattr(collating, "LARGE", 1)
    pictures = torch.arange(rows * 24).view(rows, 2, 3, 4).to(dtype)
    batch = collate([encoded(1, 2, pixel_values=pictures), encoded(3, 4, pixel_values=pictures + 1)], PAD)["pixel_values"]
    assert batch.dtype == dtype and torch.equal(batch, torch.cat([pictures, pictures + 1]))
