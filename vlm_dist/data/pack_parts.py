"""Which records are trained on and which are held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from vlm_dist.data.layouts import Columns, canonical
from vlm_dist.errors import BadSample, DataError


def split_up(records: Sequence[Any], heldout: int, limit: int | None, seed: int, columns: Columns | None) -> dict[str, list[int]]:
    """Numbers of the records of each part: about `heldout` are kept apart, by `seed`, those of one picture together; of the others `limit`.

    Raises:
        DataError: fewer records than are to be kept apart.
    """
    if heldout >= len(records):
        raise DataError(f"data pack: --heldout={heldout}, but the source has {len(records)} records; keep fewer apart")
    rng = random.Random(seed)
    groups: dict[str, list[int]] = {}
    for number in range(len(records) if heldout else 0):
        names = _picture_names(records[number], columns)
        groups.setdefault("\n".join(map(_identity, names)) or f"\n{number}", []).append(number)
    apart: set[int] = set()
    for group in rng.sample(list(groups.values()), len(groups)):
        if len(apart) >= heldout:
            break
        apart.update(group)
    train = [number for number in range(len(records)) if number not in apart]
    if limit is not None:
        train = sorted(rng.sample(train, min(limit, len(train))))
    return {"train": train} | ({"heldout": sorted(apart)} if apart else {})


def _picture_names(record: Any, columns: Columns | None) -> list[Any]:
    try:
        if isinstance(record, BadSample):
            return []
        return canonical(record, columns)["images"] or ([f"image_id {record['image_id']}"] if record.get("image_id") is not None else [])
    except BadSample:  # which packing will name
        return []


def _identity(picture: Any) -> str:
    """What two records of one picture have in common."""
    data = picture.get("bytes") if isinstance(picture, dict) else picture
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha256(str(picture).encode("utf-8", "surrogatepass")).hexdigest() if len(str(picture)) > 500 else str(picture)
