"""Folders of pictures -> records: captions in a table, in files beside the pictures, or by the names of subfolders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_dist.data.json_text import read_object
from vlm_dist.data.layout_values import NAMES_PICTURE
from vlm_dist.data.pack_files import RECORD_FILES, decoded, read_records
from vlm_dist.errors import BadSample, DataError

CAPTION_FILES = (".txt", ".caption", ".text", ".json")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.json", "metadata.tsv")


def read_folder(folder: Path, split: str | None) -> Iterator[Any]:
    """Captions of a folder of pictures: in a table, in files beside the pictures, or by the names of its subfolders.

    Raises:
        DataError: no picture and no file of records lies there.
    """
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is not None:
        yield from _read_metadata(metadata, folder)
        return
    tables = {path.parent.name: path for name in METADATA for path in sorted(folder.glob(f"*/{name}"))}
    if tables:
        yield from _read_metadata(tables[_choose(folder, sorted(tables), split)], folder)
        return
    pictures = sorted(path for path in folder.rglob("*") if NAMES_PICTURE.search(path.name) and path.is_file())
    beside = {path for path in folder.rglob("*") if path.suffix.lower() in CAPTION_FILES}
    captioned = {path: text for path in pictures if (text := _caption_file(path, beside)) is not None}
    if not captioned:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in RECORD_FILES)
        if len(files) == 1:
            yield from read_records(files[0])
            return
        if files:
            raise DataError(
                f"data pack: '{folder}' holds {', '.join(path.name for path in files[:6])}; give one of them, or 'FOLDER/*.json'"
            )
        if pictures and all(path.parent != folder for path in pictures):
            yield from _by_class(folder, pictures, split)
            return
    for picture in pictures:
        yield _captioned(picture, captioned.get(picture), folder)


def _caption_file(picture: Path, beside: set[Path]) -> Path | None:
    return next((path for suffix in CAPTION_FILES if (path := picture.with_suffix(suffix)) in beside), None)


def _captioned(picture: Path, text: Path | None, folder: Path) -> Any:
    name = str(picture.relative_to(folder))
    if text is None:
        return BadSample(f"picture '{name}' has no text beside it; expected '{picture.with_suffix('.txt').name}'")
    try:
        words = decoded(text.read_bytes())
        value = read_object(words) if text.suffix.lower() == ".json" else {"caption": words.strip()}
    except (OSError, ValueError, RecursionError, BadSample) as error:
        return BadSample(f"'{text.name}' cannot be read: {error}")
    if isinstance(value, list):
        value = {"captions": value} if all(isinstance(item, str) for item in value) else {"messages": value}
    if not isinstance(value, dict):
        return BadSample(f"'{text.name}' holds {type(value).__name__}; expected an object")
    return {**{key: item for key, item in value.items() if key not in ("image", "images")}, "image": str(picture.relative_to(folder))}


SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")


def _by_class(folder: Path, pictures: list[Path], split: str | None) -> Iterator[Any]:
    """Pictures in folders whose names say what they show; below train/ and its like only one of those."""
    tops = sorted({path.relative_to(folder).parts[0] for path in pictures})
    if (folder / "labels").is_dir() and (folder / "images").is_dir():
        raise DataError(f"data pack: '{folder}' is a YOLO data set (images/, labels/), which is not read; make COCO's JSON of it")
    if all(top.lower() in SPLITS for top in tops):
        chosen = _choose(folder, tops, split)
        pictures = [path for path in pictures if path.relative_to(folder).parts[0] == chosen and len(path.relative_to(folder).parts) > 2]
    for path in pictures:
        yield {"image": str(path.relative_to(folder)), "label": path.parent.name}


def _choose(folder: Path, names: list[str], split: str | None) -> str:
    chosen = split or ("train" if "train" in names else names[0])
    if chosen not in names:
        raise DataError(f"data pack: '{folder}' has no split '{chosen}'; it has {', '.join(names)}")
    return chosen


def _read_metadata(path: Path, folder: Path) -> Iterator[Any]:
    """The table that Hugging Face's imagefolder reads."""
    for row in read_records(path):
        if isinstance(row, BadSample):
            yield row
        elif not isinstance(row, dict) or not any(isinstance(row.get(key), str | list) for key in ("file_name", "file_names")):
            found = ", ".join(map(str, row)) if isinstance(row, dict) else row
            yield BadSample(f"{path}: expected file_name and text (or caption), found {found}")
        else:
            names = row.get("file_name") or row["file_names"]
            rest = {key: value for key, value in row.items() if key not in ("file_name", "file_names")}
            inside = path.parent.relative_to(folder)
            yield {**rest, "images": [str(inside / str(name)) for name in (names if isinstance(names, list) else [names])]}
