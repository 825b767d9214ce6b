"""Tables that are not held in memory: Parquet, and data sets of Hugging Face's library."""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_dist.data.pack_join import numbers_of_split
from vlm_dist.errors import DataError

NEEDS_DATASETS = "needs `pip install 'vlm_dist[datasets]'`"
SHARD = re.compile(r"(?P<split>[A-Za-z]\w*?)-\d+-of-\d+.*\.parquet$|(?P<name>train|validation|val|test|dev)\b.*\.parquet$")


class ParquetRecords(Sequence):
    """Rows of Parquet files; one group of rows in memory at a time. Pictures stay as they were stored, classes get their names.

    Args:
        numbers: of the rows that are records; None: all.
    """

    def __init__(self, paths: list[str], numbers: list[int] | None = None):
        try:
            from pyarrow import parquet
        except ImportError:
            raise DataError(f"data pack: reading Parquet {NEEDS_DATASETS}") from None
        self.paths, self._numbers = paths, numbers
        self._held: tuple[int, Any] = (-1, None)
        files = [parquet.ParquetFile(path) for path in paths]
        groups = [(path, group, file.metadata.row_group(group).num_rows) for path, file in zip(paths, files, strict=True)
                  for group in range(file.metadata.num_row_groups)]  # fmt: skip
        self._groups = [(path, group) for path, group, _ in groups]
        self._ends = list(itertools.accumulate(rows for _, _, rows in groups))
        self._classes = _features_of(files[0].schema_arrow.metadata)
        self.has_splits = all("split" in file.schema_arrow.names for file in files)
        """Whether a column says which split a row is of."""
        self.about = f"Parquet, {len(paths)} files: {Path(paths[0]).name} ..." if len(paths) > 1 else Path(paths[0]).name

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "numbers": self._numbers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def of_split(self, split: str, source: str) -> ParquetRecords:
        """The rows whose column `split` says so.

        Raises:
            DataError: there is none.
        """
        from pyarrow import parquet

        values = [value for path in self.paths for value in parquet.read_table(path, columns=["split"])["split"].to_pylist()]
        chosen = ParquetRecords(self.paths, numbers_of_split(values, split, source))
        chosen.about = f"{self.about}, split {split}"
        return chosen

    def __len__(self) -> int:
        return len(self._numbers) if self._numbers is not None else self._ends[-1] if self._ends else 0

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        number = number if self._numbers is None else self._numbers[number]
        group = bisect.bisect_right(self._ends, number)
        if self._held[0] != group:
            from pyarrow import parquet

            path, inside = self._groups[group]
            self._held = (group, parquet.ParquetFile(path).read_row_group(inside))
        start = self._ends[group - 1] if group else 0
        row = self._held[1].slice(number - start, 1).to_pylist()[0]
        return _named(row, self._classes)


def _features_of(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """The columns with classes in them, as Hugging Face's library notes them in the file."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return _with_classes(features)
    except (ValueError, AttributeError):
        return {}


def _with_classes(features: dict[str, Any]) -> dict[str, Any]:
    return {name: feature for name, feature in features.items() if '"ClassLabel"' in json.dumps(feature)}


def _named(row: dict[str, Any], features: dict[str, Any]) -> dict[str, Any]:
    """A row with the names of its classes; without empty cells."""
    named = {name: _with_names(row[name], feature) for name, feature in features.items() if name in row}
    return {name: value for name, value in {**row, **named}.items() if value is not None}


def _with_names(value: Any, feature: Any) -> Any:
    """A value of a column with classes, also inside of lists and structures."""
    inner = feature[0] if isinstance(feature, list) and feature else feature.get("feature") if isinstance(feature, dict) else None
    if isinstance(value, list) and inner is not None:
        return [_with_names(item, inner) for item in value]
    if isinstance(value, dict) and isinstance(inner, dict) and "_type" not in inner:  # a list of structures, column by column
        return {key: _with_names(column, [inner.get(key)]) for key, column in value.items()}
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _with_names(item, feature.get(key)) for key, item in value.items()}
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return names[value] if isinstance(names, list) and is_number and 0 <= value < len(names) else value


def choose_split(paths: list[Path], split: str | None, source: str) -> list[Path]:
    """The Parquet files of one split, where their names tell several (train-00000-of-00002.parquet).

    Raises:
        DataError: there is no such split.
    """
    found: dict[str, list[Path]] = {}
    for path in paths:
        match = SHARD.match(path.name)
        found.setdefault((match["split"] or match["name"]) if match else "", []).append(path)
    if len(found) == 1 and split is None:
        return paths
    chosen = split or ("train" if "train" in found else None)
    if chosen not in found:
        names = ", ".join(sorted(name or "files without a split in their names" for name in found))
        raise DataError(
            f"data pack: '{source}' has {'no split ' + repr(split) if split else 'several splits'}; it has {names}; name one: --split"
        )
    return found[chosen]


class HubRecords(Sequence):
    """Rows of a Hugging Face data set; pictures stay as they were stored, classes get their names."""

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
        self.about = "a Hugging Face data set"
        if isinstance(found, datasets.DatasetDict):
            names = [str(name) for name in found]
            split = split or ("train" if "train" in names else names[0])
            if split not in names and len(names) == 1 and "split" in found[names[0]].column_names:
                values, whole = found[names[0]]["split"], found[names[0]]
                found[split] = whole.select(numbers_of_split(list(values), split, source))
            elif split not in names:
                raise DataError(f"data pack: '{source}' has no split '{split}'; it has {', '.join(names)}")
            found = found[split]
            self.about += f", split {split} of {', '.join(names)}"
        for name, kind in found.features.items():
            if isinstance(kind, datasets.Image):
                found = found.cast_column(name, datasets.Image(decode=False))
            elif isinstance(getattr(kind, "feature", None), datasets.Image):
                found = found.cast_column(name, datasets.List(datasets.Image(decode=False)))
        self._classes = _with_classes(found.features.to_dict())
        self._rows = found

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        return _named(dict(self._rows[number]), self._classes)
