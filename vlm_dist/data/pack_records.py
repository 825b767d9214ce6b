"""Records that name their pictures (LLaVA's JSON, messages, captions, tars, Hugging Face data sets) -> tar shards."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_dist.config import DataConfig
from vlm_dist.data.messages import TURNS, check_messages, messages_of
from vlm_dist.data.pack_sources import open_source
from vlm_dist.data.pictures import decode_picture, picture_extension
from vlm_dist.data.shards import write_shard
from vlm_dist.errors import BadSample, DataError

PICTURE_KEYS = ("image", "images")
LEFT_OUT = "left_out.jsonl"
UNFINISHED = ".unfinished"  # folder in OUT while shards are being written
MAX_PIXELS = DataConfig.model_fields["max_image_pixels"].default
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class PackedRecords:
    """What was written, and how many records were left out."""

    shards: list[Path]
    samples: int
    left_out: int


@dataclass(frozen=True)
class Pictures:
    """How pictures go into the shards; as they are, byte for byte, unless something is asked for."""

    base: Path
    """Where relative paths begin."""
    max_side: int | None = None
    """Larger pictures are made smaller until the longer side has so many pixels (Lanczos)."""
    format: str | None = None
    """jpg, png or webp: all are encoded anew."""
    quality: int = 90
    """Of what is encoded anew as jpg or webp."""


def pack_records(
    source: str | Path,
    out: Path,
    *,
    images: Path | None = None,
    samples_per_shard: int = 1000,
    heldout: int = 0,
    limit: int | None = None,
    seed: int = 0,
    split: str | None = None,
    max_side: int | None = None,
    reencode: str | None = None,
    quality: int = 90,
    processes: int | None = None,
) -> dict[str, PackedRecords]:
    """Records with "messages", "conversations", "captions" or a caption -> shards of `KEY.jpg` (or KEY.0.jpg, ...) and `KEY.json`.
    Pictures go in byte for byte, unless `max_side` or `reencode` is given. A record that training would refuse is left out, and named in
    OUT/left_out.jsonl. Shards are written by several processes, each renamed into place when whole; the same call continues after a
    crash.

    Args:
        source: see `open_source`.
        images: where relative paths of pictures begin; None: beside the source.
        heldout: about so many records are kept apart, drawn by `seed`; records of the same pictures stay together.
        limit: keep so many training records, drawn by `seed`.
        processes: None: one per CPU.

    Raises:
        DataError: the source cannot be read, no record of it can be used, or OUT holds other shards already.
    """
    records = open_source(str(source), split)
    path = Path(source)
    base = images or (path if path.is_dir() else path.parent)
    pictures = Pictures(base, max_side, reencode, quality)
    parts = _split(records, heldout, limit, seed)
    about = {
        "source": str(path.resolve() if path.exists() else source), "records": len(records), "samples_per_shard": samples_per_shard,
        "heldout": heldout, "limit": limit, "seed": seed, "split": split, "pictures": [str(base), max_side, reencode, quality],
    }  # fmt: skip
    unfinished = _begin(out, about)
    tasks = [
        (part, number, numbers[start : start + samples_per_shard])
        for part, numbers in parts.items()
        for number, start in enumerate(range(0, len(numbers), samples_per_shard))
    ]
    _write_all(tasks, records, pictures, out, unfinished, processes)
    return _finish(tasks, out, unfinished, len(records))


def _begin(out: Path, about: dict[str, Any]) -> Path:
    """The folder of what is under way; one of the same call before is continued."""
    unfinished = out / UNFINISHED
    note = unfinished / "call.json"
    if note.exists() and json.loads(note.read_text()) == about:
        return unfinished
    present = sorted(out.glob("train-*.tar")) + sorted(out.glob("heldout-*.tar"))
    if present:
        raise DataError(f"data pack: {present[0]} is there already, of another call; use another folder, or delete it")
    unfinished.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(about))
    return unfinished


def _write_all(
    tasks: list[tuple[str, int, list[int]]], records: Sequence[Any], pictures: Pictures, out: Path, unfinished: Path, processes: int | None
) -> None:
    """Every shard that is not there yet, with a progress bar on a terminal."""
    from rich.progress import Progress

    left = [task for task in tasks if not (unfinished / f"{_name(task)}.jsonl").exists()]
    workers = min(processes or os.cpu_count() or 1, len(left))
    with Progress(transient=True, disable=not sys.stderr.isatty()) as bar:
        shown = bar.add_task("shards", total=len(tasks), completed=len(tasks) - len(left))
        if workers <= 1:
            for task in left:
                _write_one(task, [records[number] for number in task[2]], pictures, out, unfinished)
                bar.advance(shown)
            return
        whole = records if not isinstance(records, list) else None  # of a list each process gets only its part
        with ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), _receive, (whole,)) as pool:
            futures = []
            for task in left:
                part = None if whole is not None else [records[number] for number in task[2]]
                futures.append(pool.submit(_write_one, task, part, pictures, out, unfinished))
            for future in as_completed(futures):
                future.result()
                bar.advance(shown)


_RECORDS: list[Sequence[Any]] = []  # of a worker process


def _receive(records: Sequence[Any] | None) -> None:
    if records is not None:
        _RECORDS.append(records)


def _name(task: tuple[str, int, list[int]]) -> str:
    return f"{task[0]}-{task[1]:06d}"


def _write_one(task: tuple[str, int, list[int]], records: list[Any] | None, pictures: Pictures, out: Path, unfinished: Path) -> None:
    """One shard, and beside it what was left out of it. A shard all of whose records were left out is not written."""
    part, _, numbers = task
    rows = records if records is not None else (_RECORDS[0][number] for number in numbers)
    samples, problems = [], []
    for number, record in zip(numbers, rows, strict=True):
        try:
            samples.append({"__key__": f"{part}-{number:08d}", **_members(record, pictures)})
        except BadSample as reason:
            problems.append({"record": number, "reason": str(reason)})
    if samples:
        write_shard(out / f"{_name(task)}.tar", samples)
    note = unfinished / f"{_name(task)}.jsonl"
    partial = note.with_suffix(".partial")
    partial.write_text("".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems), encoding="utf-8")
    partial.rename(note)


def _finish(tasks: list[tuple[str, int, list[int]]], out: Path, unfinished: Path, total: int) -> dict[str, PackedRecords]:
    """Gather what was left out, and forget what was under way."""
    problems: list[dict[str, Any]] = []
    made: dict[str, PackedRecords] = {}
    for task in tasks:
        found = [json.loads(line) for line in (unfinished / f"{_name(task)}.jsonl").read_text(encoding="utf-8").splitlines()]
        shard = out / f"{_name(task)}.tar"
        before = made.get(task[0], PackedRecords([], 0, 0))
        kept = len(task[2]) - len(found)
        made[task[0]] = PackedRecords([*before.shards, *([shard] if kept else [])], before.samples + kept, before.left_out + len(found))
        problems += found
    if problems:
        lines = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
        (out / LEFT_OUT).write_text(lines, encoding="utf-8")
    shutil.rmtree(unfinished)
    if not any(packed.samples for packed in made.values()):
        raise DataError(f"data pack: none of the {total:,} records can be used; the first: {problems[0]['reason']}")
    return made


def _split(records: Sequence[Any], heldout: int, limit: int | None, seed: int) -> dict[str, list[int]]:
    """Numbers of the records of each part."""
    if heldout >= len(records):
        raise DataError(f"data pack: --heldout={heldout}, but the source has {len(records)} records; keep fewer apart")
    rng = random.Random(seed)
    groups: dict[str, list[int]] = {}
    for number in range(len(records) if heldout else 0):
        names = _picture_names(records[number]) if isinstance(records[number], dict) else []
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


def _identity(picture: Any) -> str:
    """What two records of one picture have in common."""
    if isinstance(picture, dict) and picture.get("bytes"):
        return hashlib.sha256(picture["bytes"]).hexdigest()
    return str(picture)


def _members(record: Any, pictures_as: Pictures) -> dict[str, bytes]:
    """The files of a sample.

    Raises:
        BadSample: training would refuse it.
    """
    if isinstance(record, BadSample):
        raise record
    if not isinstance(record, dict):
        raise BadSample("the record is no object")
    pictures = [_read_picture(pictures_as, name) for name in _picture_names(record)]
    messages = messages_of(record)
    if messages is None and not (pictures and (_is_text(record.get("caption")) or _are_texts(record.get("captions")))):
        raise BadSample("no text: expected 'messages', 'conversations', or a picture with a caption")
    kept = {key: value for key, value in record.items() if key not in (*PICTURE_KEYS, *TURNS)}
    if messages is not None:
        check_messages(messages, len(pictures))
        kept["messages"] = messages
    several = len(pictures) > 1
    files = {(f"{number}.{kind}" if several else kind): data for number, (kind, data) in enumerate(pictures)}
    return {**files, "json": json.dumps(kept, ensure_ascii=False, default=str).encode()}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(_is_text, values))


def _picture_names(record: dict[str, Any]) -> list[Any]:
    """What "image" or "images" names, or else the messages' own parts, in order."""
    for key in PICTURE_KEYS:
        if record.get(key):
            return record[key] if isinstance(record[key], list) else [record[key]]
    messages = record.get("messages")
    turns = [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []
    parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
    return [part["image"] for part in parts if isinstance(part, dict) and part.get("type") == "image" and part.get("image")]


def _read_picture(pictures: Pictures, name: Any) -> tuple[str, bytes]:
    """(extension by the first bytes, bytes) of a file, or of a Parquet cell {"bytes", "path"}."""
    from PIL import Image

    base = pictures.base
    name = {key: value for key, value in name.items() if value is not None} if isinstance(name, dict) else name
    try:
        if isinstance(name, dict):
            data = name["bytes"] if name.get("bytes") else (base / name["path"]).read_bytes()
        else:
            data = (base / name).read_bytes()
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BadSample(f"picture {str(name)[:200]!r} cannot be read below '{base}' ({type(error).__name__})") from None
    shown = str(name.get("path") or "in the record") if isinstance(name, dict) else str(name)
    kind = picture_extension(data)
    if kind is None:
        raise BadSample(f"picture {shown[:200]!r} is no JPEG, PNG or WebP file")
    picture = decode_picture(data, shown[:200], MAX_PIXELS)
    limit = pictures.max_side or max(picture.size)
    if max(picture.size) <= limit and pictures.format is None:
        return kind, data
    if max(picture.size) > limit:
        picture.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    kind, buffer = pictures.format or kind, io.BytesIO()
    picture.save(buffer, FORMATS[kind], **({} if kind == "png" else {"quality": pictures.quality}))
    return kind, buffer.getvalue()
