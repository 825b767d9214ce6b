"""What `vlm-dist data pack` reads: any of these becomes a sequence of records, each with pictures and text in a layout of its own."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlm_dist.data.clips import video_members
from vlm_dist.data.file_kinds import is_tar, why_no_source
from vlm_dist.data.json_text import read_object
from vlm_dist.data.layout_values import PICTURE_KEYS
from vlm_dist.data.layout_videos import VIDEO_KEYS
from vlm_dist.data.members import TEXT_MEMBERS, members_found
from vlm_dist.data.pack_files import decoded, read_records
from vlm_dist.data.pack_folders import read_folder
from vlm_dist.data.pack_join import joined, of_split, refuse_half
from vlm_dist.data.pack_tables import HubRecords, ParquetRecords, choose_split
from vlm_dist.data.samples import takes_text
from vlm_dist.errors import BadSample, DataError

PICTURE = re.compile(r"(?:(\d+)\.)?(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|heic|heif|avif|ppm)")


class Listed(list):
    """Records in memory."""

    about = ""
    """What they were read from, in words."""


def open_source(source: str, split: str | None = None, annotations: str | None = None) -> Sequence[Any]:
    """Records, by number; picklable, so that several processes may read. One that cannot be read is a BadSample.

    Args:
        source: JSON (a list, an object that wraps one, COCO's tables), JSON lines, CSV or TSV, Parquet, or a folder or glob of them; a
            folder of pictures, each with a caption in NAME.txt or all in metadata.jsonl or metadata.csv, or in subfolders named by what
            they show; tars that hold pictures and text, such as img2dataset's (a glob or brace pattern); a folder that
            `Dataset.save_to_disk` wrote, or a data set's id on the Hugging Face hub.
        split: of a Hugging Face data set, of a folder with several, or what the records' key `split` says ("train,restval": two).
        annotations: a second file whose records have the answers to the source's questions, as VQA's.

    Raises:
        DataError: it cannot be read, or holds no record.
    """
    path = Path(source)
    try:
        records = _open(source, path, split)
        if annotations is not None:
            records = _listed(
                joined(records, _open(annotations, Path(annotations), None), source, annotations),
                f"{path.name} with {Path(annotations).name}",
            )
        elif isinstance(records, Listed):
            refuse_half(records, source)
        if split is not None and isinstance(records, Listed) and not (path / split).is_dir():
            records = _listed((records[number] for number in of_split(records, split, source)), f"{records.about}, split {split}")
    except OSError as error:
        raise DataError(f"data pack: '{source}' cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:  # of json, of UTF-8, of Parquet
        if isinstance(error, DataError):
            raise
        raise DataError(f"data pack: '{source}' cannot be read: {(str(error) or type(error).__name__).splitlines()[0][:200]}") from None
    if not len(records):
        raise DataError(f"data pack: '{source}' holds no record; expected a list of objects, or a folder of captioned pictures")
    return records


def _open(source: str, path: Path, split: str | None) -> Sequence[Any]:
    if source.endswith(".tar") or (path.is_file() and is_tar(path)):
        return _tars([source], split)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return HubRecords(source, split)
    if not path.exists() and re.search(r"[*?\[{]", source):
        return _open_all(source, _matching(source), split)
    if not path.exists():
        return HubRecords(source, split)
    if not path.is_dir():
        return _open_all(source, [path], split)
    if tars := sorted(path.glob("*.tar")):
        return _tars([str(tar) for tar in tars], split)
    if parquets := sorted(path.rglob("*.parquet")):
        return _open_all(source, parquets, split)
    return _listed(read_folder(path, split), f"the folder {path.name}")


def _tars(patterns: list[str], split: str | None) -> TarRecords:
    if split is not None:
        raise DataError(f"data pack: --split {split}: found with tars, which have no splits; name the tars of one split")
    return TarRecords(patterns)


def _matching(pattern: str) -> list[Path]:
    from braceexpand import braceexpand

    found = [path for part in braceexpand(pattern) for path in sorted(glob.glob(part, recursive=True))]
    if not found:
        raise DataError(f"data pack: no file matches '{pattern}'")
    return [Path(path) for path in dict.fromkeys(found)]


def _open_all(source: str, paths: list[Path], split: str | None) -> Sequence[Any]:
    """Files of one kind: Parquet's are read piece by piece, others whole."""
    for path in paths:
        if (reason := why_no_source(path)) is not None:
            raise DataError(f"data pack: '{path}' {reason}")
    with paths[0].open("rb") as file:
        is_parquet = file.read(4) == b"PAR1" or paths[0].suffix.lower() == ".parquet"
    if is_parquet:
        records = ParquetRecords([str(path) for path in paths])
        if split is not None and records.has_splits:
            return records.of_split(split, source)
        chosen = choose_split(paths, split, source)
        records = ParquetRecords([str(path) for path in chosen])
        if len(chosen) < len(paths):
            records.about += f"; {len(paths) - len(chosen)} files of other splits are left out, --split names one"
        return records
    words = paths[0].name if len(paths) == 1 else f"{len(paths)} files"
    return _listed((record for path in paths for record in read_records(path)), words)


def _listed(records: Iterable[Any], about: str) -> Listed:
    listed = Listed(records)
    listed.about = about
    return listed


class TarRecords(Sequence):
    """Samples of tars, as records."""

    about = "tars"

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
        try:
            raw = self._dataset.raw(number)
            record = _record_of(raw)
        except BadSample as reason:
            return reason
        found = sorted((int(match[1] or 0), name) for name in raw if (match := PICTURE.fullmatch(name)))
        if found:  # what the JSON says of pictures is where they once lay
            record = {key: value for key, value in record.items() if key not in PICTURE_KEYS}
            record["images"] = [{"bytes": raw[name], "path": f"{raw['__key__']}.{name}"} for _, name in found]
        moving = [name for name in video_members(raw) if isinstance(name, str) and not PICTURE.fullmatch(name)]
        if moving:
            record = {key: value for key, value in record.items() if key not in VIDEO_KEYS}
            record["videos"] = [{"bytes": raw[name], "path": f"{raw['__key__']}.{name}"} for name in moving]
        return record


def _record_of(raw: dict[str, Any]) -> dict[str, Any]:
    """What a sample's JSON and text say.

    Raises:
        BadSample: they cannot be read.
    """
    try:
        record = read_object(decoded(raw["json"])) if "json" in raw else {}
        member = next((name for name in TEXT_MEMBERS if name in raw), None)
        text = decoded(raw[member]).strip() if member else None
    except (ValueError, RecursionError, BadSample) as error:
        raise BadSample(f"{raw['__key__']}: {error}") from None
    if isinstance(record, list):
        record = {"captions": record} if all(isinstance(item, str) for item in record) else {"messages": record}
    if not isinstance(record, dict):
        raise BadSample(f"{raw['__key__']}.json: expected an object with 'messages', 'conversations' or 'captions'")
    if not record and not text:
        raise BadSample(f"no text: expected json, txt, text or caption{members_found(raw)}")
    if not text or takes_text(record):
        return {**record, "caption": text} if text else record
    return record if text in raw["json"].decode("utf-8", "replace") else {**record, f".{member}": text}  # which nothing reads, and is told
