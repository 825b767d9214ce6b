"""Data sets as people have them -> tar shards."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.data.pack_pictures import Pictures
from vlm_dist.data.pack_split import split_records
from vlm_dist.data.pictures import picture_extension
from vlm_dist.data.shards import write_shards
from vlm_dist.errors import DataError

CAPTION_COLUMN = "caption_"
SPLIT_FILES = {"train": "Flickr_8k.trainImages.txt", "validation": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
CAPTION_FILES = ("captions.txt", "Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt")


@dataclass(frozen=True)
class Packed:
    """What was written."""

    shards: list[Path]
    samples: int


def pack_flickr8k(
    source: str, out: Path, *, samples_per_shard: int = 1000, limit: int | None = None, heldout: int = 1000, seed: int = 0
) -> dict[str, Packed]:
    """Flickr8k (Hodosh et al. 2013, doi:10.1613/jair.3994) -> shards of `KEY.jpg` and `KEY.json` with {"captions": [five texts]}.

    Args:
        source: a hub id such as jxie/flickr8k or a folder with its files (columns image, caption_0 ... caption_4); or a folder with
            the pictures and captions.txt or Flickr8k.token.txt, and perhaps Flickr_8k.trainImages.txt and its like.
        limit: keep so many training pictures, drawn by `seed`.
        heldout: pictures kept apart where the source has one split only.

    Returns:
        What was written by split: train, and validation and test where the source has them, or heldout.

    Raises:
        DataError: the source is none of these.
    """
    captions = next((Path(source) / name for name in CAPTION_FILES if (Path(source) / name).is_file()), None)
    splits = _read_folder(Path(source), captions) if captions else _read_columns(source)
    if set(splits) == {"train"}:
        splits = _hold_out(splits["train"], heldout, seed)
    if limit is not None:
        rows = splits["train"]
        splits["train"] = [rows[number] for number in sorted(random.Random(seed).sample(range(len(rows)), min(limit, len(rows))))]
    made = {}
    for split, rows in splits.items():
        shards = write_shards(out, f"flickr8k-{split}", _samples(rows), samples_per_shard=samples_per_shard, total=len(rows))
        made[split] = Packed(shards, len(rows))
    return made


@dataclass(frozen=True)
class _Row:
    key: str
    picture: Path | Any
    """A file, or (data set, row number)."""
    captions: list[str]


def _samples(rows: Iterable[_Row]) -> Iterator[dict[str, Any]]:
    for row in rows:
        data = _bytes_of(row)
        yield {
            "__key__": row.key,
            picture_extension(data) or "jpg": data,
            "json": json.dumps({"captions": row.captions}, ensure_ascii=False).encode(),
        }


def _read_columns(source: str) -> dict[str, list[_Row]]:
    """Rows of a Hugging Face data set, by split; pictures stay encoded."""
    try:
        from datasets import Image, load_dataset
    except ImportError:
        raise DataError("data pack: reading a Hugging Face data set needs `pip install 'vlm_dist[datasets]'`") from None
    if Path(source).exists() and not any(path for kind in ("*.parquet", "*.arrow") for path in Path(source).rglob(kind)):
        raise DataError(
            f"data pack: '{source}' holds neither captions.txt (or Flickr8k.token.txt) nor parquet files; "
            "give the folder of the data set, or the hub id jxie/flickr8k"
        )
    try:
        tables = load_dataset(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"data pack: '{source}' cannot be read as a data set: {str(error).splitlines()[0][:200]}") from None
    splits = {}
    for split, table in tables.items():
        columns = sorted(name for name in table.column_names if name.startswith(CAPTION_COLUMN))
        if "image" not in table.column_names or not columns:
            raise DataError(
                f"data pack: '{source}' has the columns {', '.join(table.column_names)}; expected image and caption_0, caption_1, ..."
            )
        table = table.cast_column("image", Image(decode=False))
        texts: Any = table.select_columns(columns)
        splits[str(split)] = [
            _Row(f"{split}-{number:06d}", (table, number), [row[name].strip() for name in columns if row[name] and row[name].strip()])
            for number, row in enumerate(texts)
        ]
    return splits


def _read_folder(folder: Path, captions_file: Path) -> dict[str, list[_Row]]:
    """Rows of a folder of pictures with a file of captions; captions without a picture are left out."""
    captions: dict[str, list[str]] = {}
    for name, text in _read_captions(captions_file):
        captions.setdefault(name, []).append(text)
    files = {path.name: path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")}
    known = {name: _Row(Path(name).stem.replace(".", "_"), files[name], texts) for name, texts in captions.items() if name in files}
    if not known:
        raise DataError(f"data pack: none of the {len(captions)} pictures that {captions_file} names lies below '{folder}'")
    splits = {}
    for split, name in SPLIT_FILES.items():
        path = captions_file.parent / name
        if path.is_file():
            wanted = path.read_text(encoding="utf-8").split()
            splits[split] = [known[picture] for picture in wanted if picture in known]
    return splits or {"train": list(known.values())}


def _read_captions(path: Path) -> Iterator[tuple[str, str]]:
    """(picture's name, caption): `image,caption` as CSV with a header, or `image#number<TAB>caption`."""
    text = path.read_text(encoding="utf-8")
    if "\t" in text.partition("\n")[0]:
        for line in text.splitlines():
            name, _, caption = line.partition("\t")
            if caption.strip():
                yield name.partition("#")[0], caption.strip()
        return
    rows = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    if not {"image", "caption"} <= set(rows.fieldnames or ()):
        raise DataError(f"data pack: {path}: expected the columns image and caption, found {', '.join(rows.fieldnames or ())}")
    for row in rows:
        if row["caption"] and row["caption"].strip():
            yield row["image"], row["caption"].strip()


def _hold_out(rows: list[_Row], count: int, seed: int) -> dict[str, list[_Row]]:
    if not 0 < count < len(rows):
        raise DataError(f"data pack: --heldout={count}, but the source has {len(rows)} pictures; keep fewer apart")
    parts = split_records(_Shown(rows), Pictures(Path()), heldout=count, seed=seed, tell=print)
    return {part: [rows[number] for number in numbers] for part, numbers in parts.numbers.items()}


class _Shown(Sequence):
    """Rows as records that are looked at one by one."""

    def __init__(self, rows: list[_Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> dict[str, Any]:
        return {"image": {"bytes": _bytes_of(self.rows[number])}, "caption": "-"}


def _bytes_of(row: _Row) -> bytes:
    if isinstance(row.picture, Path):
        return row.picture.read_bytes()
    table, number = row.picture
    return _picture_bytes(table[number]["image"])


def _picture_bytes(value: dict[str, Any]) -> bytes:
    return value["bytes"] if value.get("bytes") else Path(value["path"]).read_bytes()
