"""What `vlm-dist data pack` reads: any of these becomes a sequence of records, each a dict with pictures and text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_dist.data.messages import TURNS
from vlm_dist.data.samples import open_record, picture_members
from vlm_dist.errors import BadSample, DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv")
NEEDS_DATASETS = "needs `pip install 'vlm_dist[datasets]'`"


def open_source(source: str, split: str | None = None) -> Sequence[Any]:
    """Records, by number; picklable, so that several processes may read.

    Args:
        source: a .json file (a list), .jsonl or .parquet; a folder of pictures, each with a caption in NAME.txt or all in metadata.jsonl
            or metadata.csv (columns file_name and text or caption); tars that hold pictures and text, such as img2dataset's (a glob or
            brace pattern); a folder that `Dataset.save_to_disk` wrote, or a data set's id on the Hugging Face hub.
        split: of a Hugging Face data set.

    Raises:
        DataError: it cannot be read, or holds no record.
    """
    path = Path(source)
    if source.endswith(".tar"):
        records: Sequence[Any] = TarRecords([source])
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file() or not path.exists():
        records = HubRecords(source, split)
    else:
        records = list(_read(path))
    if not len(records):
        raise DataError(f"data pack: '{source}' holds no record; expected a list of objects, or a folder of captioned pictures")
    return records


class TarRecords(Sequence):
    """Samples of tars, as records."""

    def __init__(self, patterns: list[str]):
        self.patterns = patterns
        self._open()

    def _open(self) -> None:
        from vlm_dist.data.dataset import open_dataset
        from vlm_dist.data.storage import Storage

        self._dataset = open_dataset(self.patterns, "data pack", Storage())

    def __getstate__(self) -> dict[str, Any]:
        return {"patterns": self.patterns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        return len(self._dataset.index)

    def __getitem__(self, number: Any) -> Any:
        raw = self._dataset.raw(number)
        try:
            record = open_record(raw)
        except BadSample as reason:
            return reason
        if "txt" in raw and not TURNS.keys() & record.keys():
            record["caption"] = raw["txt"].decode("utf-8", "replace")
        return {**record, "images": [{"bytes": raw[name], "path": f"{raw['__key__']}.{name}"} for name in picture_members(raw)]}


class HubRecords(Sequence):
    """Rows of a Hugging Face data set; pictures stay as they were stored."""

    def __init__(self, source: str, split: str | None):
        try:
            import datasets
        except ImportError:
            raise DataError(f"data pack: '{source}' is no file or folder here; a data set of the hub {NEEDS_DATASETS}") from None

        is_saved = Path(source).exists()
        try:
            found = datasets.load_from_disk(source) if is_saved else datasets.load_dataset(source)
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(
                f"data pack: '{source}' is no file or folder here, and no data set that can be loaded ({str(error).splitlines()[0][:200]})"
            ) from None
        if isinstance(found, datasets.DatasetDict):
            names = [str(name) for name in found]
            split = split or ("train" if "train" in names else names[0])
            if split not in names:
                raise DataError(f"data pack: '{source}' has no split '{split}'; it has {', '.join(names)}")
            found = found[split]
        for name, kind in found.features.items():
            if isinstance(kind, datasets.Image):
                found = found.cast_column(name, datasets.Image(decode=False))
            elif isinstance(getattr(kind, "feature", None), datasets.Image):
                found = found.cast_column(name, datasets.List(datasets.Image(decode=False)))
        self._rows = found

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        row = {name: value for name, value in self._rows[number].items() if value is not None}
        if isinstance(row.get("text"), str) and "caption" not in row:
            row["caption"] = row.pop("text")
        return row


def _read(source: Path) -> Iterator[Any]:
    try:
        if source.is_dir():
            yield from _read_folder(source)
        elif source.suffix == ".parquet":
            yield from _read_parquet(source)
        elif source.suffix == ".jsonl":
            yield from _read_lines(source)
        else:
            records = json.loads(source.read_text(encoding="utf-8"))
            if not isinstance(records, list):
                raise DataError(f"data pack: '{source}' holds no list; expected [{{...}}, ...], or one object a line in a .jsonl file")
            yield from records
    except OSError as error:
        raise DataError(f"data pack: '{source}' cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # of json, of UTF-8, of Parquet
        raise DataError(f"data pack: '{source}' cannot be read: {str(error)[:200]}") from None


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"data pack: '{path}' line {number}: {error}") from None


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"data pack: reading Parquet {NEEDS_DATASETS}") from None
    for batch in parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _read_folder(folder: Path) -> Iterator[dict[str, Any]]:
    """Captions of a folder of pictures, as records."""
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is None:
        for picture in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
            text = picture.with_suffix(".txt")
            yield {"image": str(picture.relative_to(folder)), "caption": text.read_text(encoding="utf-8") if text.is_file() else None}
        return
    rows = _read_lines(metadata) if metadata.suffix == ".jsonl" else csv.DictReader(io.StringIO(metadata.read_text(encoding="utf-8")))
    for row in rows:
        if not isinstance(row, dict) or "file_name" not in row or not ({"text", "caption"} & set(row)):
            found = ", ".join(map(str, row)) if isinstance(row, dict) else row
            raise DataError(f"data pack: {metadata}: expected file_name and text (or caption), found {found}")
        yield {"image": row["file_name"], "caption": row.get("text") or row.get("caption")}
