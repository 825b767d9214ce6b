"""Records that name their pictures (LLaVA's JSON, JSON lines or Parquet with messages, a folder of captioned pictures) -> tar shards."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.config import DataConfig
from vlm_dist.data.samples import BadSample, check_messages, decode_picture, picture_extension, read_messages
from vlm_dist.data.shards import write_shards
from vlm_dist.errors import DataError

PICTURE_KEYS = ("image", "images")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv")
LEFT_OUT = "left_out.jsonl"
MAX_PIXELS = DataConfig.model_fields["max_image_pixels"].default


@dataclass(frozen=True)
class PackedRecords:
    """What was written, and how many records were left out."""

    shards: list[Path]
    samples: int
    left_out: int


def pack_records(
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    samples_per_shard: int = 1000,
    heldout: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, PackedRecords]:
    """Records with "messages", "conversations" or a caption -> shards of `KEY.jpg` (or KEY.0.jpg, ...) and `KEY.json`. Pictures go in byte
    for byte. A record that training would refuse is left out, and named in OUT/left_out.jsonl.

    Args:
        source: a .json file (a list), .jsonl or .parquet; or a folder of pictures, each with a caption in NAME.txt or all in
            metadata.jsonl or metadata.csv (columns file_name and text or caption).
        images: where relative paths of pictures begin; None: beside the source.
        heldout: about so many records are kept apart, drawn by `seed`; records of the same pictures stay together.
        limit: keep so many training records, drawn by `seed`.

    Raises:
        DataError: the source cannot be read, no record of it can be used, or OUT holds shards already.
    """
    records = list(_read(source))
    if not records:
        raise DataError(f"data pack: '{source}' holds no record; expected a list of objects, or a folder of captioned pictures")
    present = sorted(out.glob("train-*.tar")) + sorted(out.glob("heldout-*.tar"))
    if present:
        raise DataError(f"data pack: {present[0]} is there already; use another folder, or delete it")
    base = images or (source if source.is_dir() else source.parent)
    splits, problems = _split(records, heldout, limit, seed), []
    out.mkdir(parents=True, exist_ok=True)
    made = {}
    for split, numbers in splits.items():
        before = len(problems)
        samples = _samples(((number, records[number]) for number in numbers), split, base, problems)
        shards = write_shards(out, split, samples, samples_per_shard=samples_per_shard, total=len(numbers))
        left_out = len(problems) - before
        made[split] = PackedRecords(shards, len(numbers) - left_out, left_out)
    if problems:
        with (out / LEFT_OUT).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
    if not any(packed.samples for packed in made.values()):
        raise DataError(f"data pack: none of the {len(records):,} records can be used; the first: {problems[0]['reason']}")
    return made


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
        raise DataError("data pack: reading Parquet needs `pip install 'vlm_dist[datasets]'`") from None
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


def _split(records: list[Any], heldout: int, limit: int | None, seed: int) -> dict[str, list[int]]:
    """Numbers of the records of each part."""
    if heldout >= len(records):
        raise DataError(f"data pack: --heldout={heldout}, but the source has {len(records)} records; keep fewer apart")
    rng = random.Random(seed)
    groups: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        names = _picture_names(record) if isinstance(record, dict) else []
        groups.setdefault("\n".join(map(str, names)) or f"\n{number}", []).append(number)
    apart: set[int] = set()
    for group in rng.sample(list(groups.values()), len(groups)):
        if len(apart) >= heldout:
            break
        apart.update(group)
    train = [number for number in range(len(records)) if number not in apart]
    if limit is not None:
        train = sorted(rng.sample(train, min(limit, len(train))))
    return {"train": train} | ({"heldout": sorted(apart)} if apart else {})


def _samples(rows: Iterator[tuple[int, Any]], split: str, base: Path, problems: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for number, record in rows:
        try:
            yield {"__key__": f"{split}-{number:08d}", **_members(record, base)}
        except BadSample as reason:
            problems.append({"record": number, "reason": str(reason)})


def _members(record: Any, base: Path) -> dict[str, bytes]:
    """The files of a sample.

    Raises:
        BadSample: training would refuse it.
    """
    if not isinstance(record, dict):
        raise BadSample("the record is no object")
    pictures = [_read_picture(base, name) for name in _picture_names(record)]
    if record.get("conversations") is not None:
        messages = read_messages(record["conversations"], "from", "value")
    elif record.get("messages") is not None:
        messages = read_messages(record["messages"])
    elif isinstance(record.get("caption"), str) and record["caption"].strip() and pictures:
        messages = None
    else:
        raise BadSample("no text: expected 'messages', 'conversations', or a picture with a caption")
    kept = {key: value for key, value in record.items() if key not in (*PICTURE_KEYS, "conversations", "messages")}
    if messages is not None:
        check_messages(messages, len(pictures))
        kept["messages"] = messages
    several = len(pictures) > 1
    files = {(f"{number}.{kind}" if several else kind): data for number, (kind, data) in enumerate(pictures)}
    return {**files, "json": json.dumps(kept, ensure_ascii=False, default=str).encode()}


def _picture_names(record: dict[str, Any]) -> list[Any]:
    """What "image" or "images" names, or else the messages' own parts, in order."""
    for key in PICTURE_KEYS:
        if record.get(key):
            return record[key] if isinstance(record[key], list) else [record[key]]
    messages = record.get("messages")
    turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
    return [part["image"] for part in parts if isinstance(part, dict) and part.get("type") == "image" and part.get("image")]


def _read_picture(base: Path, name: Any) -> tuple[str, bytes]:
    """(extension by the first bytes, bytes) of a file, or of a Parquet cell {"bytes", "path"}."""
    try:
        if isinstance(name, dict):
            data = name["bytes"] if name.get("bytes") else (base / name["path"]).read_bytes()
        else:
            data = (base / name).read_bytes()
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BadSample(f"picture {str(name)[:200]!r} cannot be read below '{base}' ({type(error).__name__})") from None
    kind = picture_extension(data)
    if kind is None:
        raise BadSample(f"picture {str(name)[:200]!r} is no JPEG, PNG or WebP file")
    decode_picture(data, str(name)[:200], MAX_PIXELS)
    return kind, data
