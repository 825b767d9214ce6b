"""Records that name their pictures (LLaVA's JSON, messages, captions, tars, Hugging Face data sets) -> tar shards."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_dist.data.fetch import Fetcher
from vlm_dist.data.layouts import Columns, canonical
from vlm_dist.data.pack_calls import begin, describe_source, done_before, remember
from vlm_dist.data.pack_join import picture_by_number, refuse_unread_picture
from vlm_dist.data.pack_look import first_look
from vlm_dist.data.pack_pictures import MAX_PIXELS, Pictures, read_picture, with_sizes
from vlm_dist.data.pack_sources import open_source
from vlm_dist.data.pack_split import check_heldout, split_records
from vlm_dist.data.pack_videos import read_videos
from vlm_dist.data.pictures import NEEDS_HEIF
from vlm_dist.data.samples import outline
from vlm_dist.data.shards import write_shard
from vlm_dist.data.unread import notes_of
from vlm_dist.errors import BadSample, DataError

LEFT_OUT = "left_out.jsonl"


@dataclass(frozen=True)
class PackedRecords:
    """What was written, and how many records were left out."""

    shards: list[Path]
    samples: int
    left_out: int
    notes: Counter[str] = field(default_factory=Counter)
    """What was converted or dropped, see `pack_pictures.in_words`."""

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "shards": [shard.name for shard in self.shards], "notes": dict(self.notes)}

    @classmethod
    def of(cls, out: Path, stored: dict[str, Any]) -> PackedRecords:
        """What `to_dict` gave."""
        return cls(**{**stored, "shards": [out / name for name in stored["shards"]], "notes": Counter(stored["notes"])})


def pack_records(
    source: str | Path,
    out: Path,
    *,
    images: Path | None = None,
    samples_per_shard: int = 1000,
    heldout: int = 0,
    dedup: bool = False,
    limit: int | None = None,
    seed: int = 0,
    split: str | None = None,
    annotations: str | None = None,
    max_side: int | None = None,
    reencode: str | None = None,
    quality: int = 90,
    processes: int | None = None,
    columns: Columns | None = None,
    fetcher: Fetcher | None = None,
    tell: Callable[[str], None] | None = None,
    look_only: bool = False,
) -> dict[str, PackedRecords]:
    """Records in any layout of `layouts.LAYOUTS` -> shards of `KEY.jpg` (or KEY.0.jpg, ...), `KEY.mp4` and `KEY.json`. Files go in byte for
    byte, unless `max_side` or `reencode` is given, they are no JPEG, PNG or WebP, or a video can be cut to its part. A record that training
    would refuse is left out, and named in OUT/left_out.jsonl. Several processes write shards, each renamed into place when whole; the same
    call continues after a crash, and finds what it made before.

    Args:
        source, split, annotations: see `open_source`.
        images: where relative paths of pictures and videos begin; None: beside the source.
        heldout: about so many records are kept apart, by `seed`; those that show the same picture together, whatever it is called.
        dedup: pictures that look alike are one picture; of records that say the same of one the first is kept.
        limit, processes: keep so many training records, by `seed`; None: all; write so many shards at a time; None: one per CPU.
        columns: which keys hold question, answer and picture; None: the layout is recognised.
        fetcher: of pictures at http(s) addresses; None: records with such pictures are left out.
        tell, look_only: the first look is told in words; after it nothing is packed.

    Raises:
        DataError: the source cannot be read, no record of it can be used, `images` is no folder, or OUT holds other shards already.
    """
    base = _base(images, Path(source))
    records = open_source(str(source), split, annotations)
    say = tell or (lambda text: None)
    say("\n".join(first_look(str(source), records, columns)))
    if look_only:
        return {}
    pictures = Pictures(base, max_side, reencode, quality, fetcher)
    about = {
        **describe_source(str(source)), "records": len(records), "samples_per_shard": samples_per_shard, "heldout": heldout, "dedup": dedup,
        "limit": limit, "seed": seed, "split": split, "pictures": [str(base), max_side, reencode, quality],
        "columns": str(columns or Columns()), "fetcher": str(fetcher), "annotations": annotations and describe_source(annotations),
    }  # fmt: skip
    if (before := done_before(out, about, say)) is not None:
        return {part: PackedRecords.of(out, made) for part, made in before.items()}
    check_heldout(heldout, len(records))
    unfinished = begin(out, about)
    parts = split_records(records, pictures, columns, heldout=heldout, limit=limit, seed=seed, dedup=dedup, tell=say)
    tasks = _tasks(parts.numbers, samples_per_shard)
    _write_all(tasks, records, _Job(pictures, columns, out, unfinished), processes)
    return _finish(tasks, parts.dropped, out, unfinished, len(records), about)


def _tasks(parts: dict[str, list[int]], samples_per_shard: int) -> list[tuple[str, int, list[int]]]:
    """(part, number of the shard, numbers of its records) of each shard."""
    return [
        (part, number, numbers[start : start + samples_per_shard])
        for part, numbers in parts.items()
        for number, start in enumerate(range(0, len(numbers), samples_per_shard))
    ]


def _base(images: Path | None, source: Path) -> Path:
    """Where paths of pictures begin."""
    if images is None:
        return source if source.is_dir() else source.parent
    if not images.is_dir():
        raise DataError(f"data pack: --images: '{images}' is no folder here; give the one where paths of pictures begin")
    return images


@dataclass(frozen=True)
class _Job:
    """What all shards have in common."""

    pictures: Pictures
    columns: Columns | None
    out: Path
    unfinished: Path


def _write_all(tasks: list[tuple[str, int, list[int]]], records: Sequence[Any], job: _Job, processes: int | None) -> None:
    """Every shard that is not there yet, with a progress bar on a terminal."""
    from rich.progress import Progress

    left = [task for task in tasks if not (job.unfinished / f"{_name(task)}.jsonl").exists()]
    workers = min(processes or os.cpu_count() or 1, len(left))
    with Progress(transient=True, disable=not sys.stderr.isatty()) as bar:
        shown = bar.add_task("shards", total=len(tasks), completed=len(tasks) - len(left))
        if workers <= 1:
            for task in left:
                _write_one(task, [records[number] for number in task[2]], job)
                bar.advance(shown)
            return
        whole = records if not isinstance(records, list) else None  # of a list each process gets only its part
        with ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), _receive, (whole,)) as pool:
            futures = []
            for task in left:
                part = None if whole is not None else [records[number] for number in task[2]]
                futures.append(pool.submit(_write_one, task, part, job))
            for future in as_completed(futures):
                future.result()
                bar.advance(shown)


_RECORDS: list[Sequence[Any]] = []  # of a worker process


def _receive(records: Sequence[Any] | None) -> None:
    if records is not None:
        _RECORDS.append(records)


def _name(task: tuple[str, int, list[int]]) -> str:
    return f"{task[0]}-{task[1]:06d}"


def _write_one(task: tuple[str, int, list[int]], records: list[Any] | None, job: _Job) -> None:
    """One shard, and beside it what was left out of it and what was converted. A shard without a record is not written."""
    part, _, numbers = task
    rows = records if records is not None else (_RECORDS[0][number] for number in numbers)
    problems: list[dict[str, Any]] = []
    notes = Counter[str]()

    def samples() -> Iterator[dict[str, Any]]:
        for number, record in zip(numbers, rows, strict=True):
            here = Counter[str]()
            try:
                key = f"{part}-{number:08d}"
                yield {"__key__": key, **_members(record, key, job.pictures, job.columns, here)}
                notes.update(here)
            except BadSample as reason:
                notes["heif"] += NEEDS_HEIF in str(reason)
                problems.append({"record": number, "reason": str(reason)})

    coming = samples()  # one at a time: those of videos are large
    if (first := next(coming, None)) is not None:
        write_shard(job.out / f"{_name(task)}.tar", itertools.chain([first], coming))
    note = job.unfinished / f"{_name(task)}.jsonl"
    partial = note.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in [dict(notes), *problems]), encoding="utf-8")
    partial.rename(note)


def _finish(
    tasks: list[tuple[str, int, list[int]]], dropped: list[dict[str, Any]], out: Path, unfinished: Path, total: int,
    about: dict[str, Any],
) -> dict[str, PackedRecords]:  # fmt: skip
    """Gather what was left out, and remember the call."""
    problems: list[dict[str, Any]] = list(dropped)
    made: dict[str, PackedRecords] = {"train": PackedRecords([], 0, len(dropped))}
    for task in tasks:
        notes, *found = [json.loads(line) for line in (unfinished / f"{_name(task)}.jsonl").read_text(encoding="utf-8").splitlines()]
        shard = out / f"{_name(task)}.tar"
        before = made.get(task[0], PackedRecords([], 0, 0))
        kept = len(task[2]) - len(found)
        shards = [*before.shards, *([shard] if kept else [])]
        made[task[0]] = PackedRecords(shards, before.samples + kept, before.left_out + len(found), before.notes + Counter(notes))
        problems += found
    if problems:
        lines = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
        (out / LEFT_OUT).write_text(lines, encoding="utf-8", errors="backslashreplace")
    if not any(packed.samples for packed in made.values()):
        shutil.rmtree(unfinished)
        reasons = list(dict.fromkeys(problem["reason"] for problem in problems))
        others = f"; another: {reasons[1]}" if reasons[1:] else ""
        raise DataError(f"data pack: none of the {total:,} records can be used; the first: {reasons[0]}{others}")
    remember(out, about, {part: packed.to_dict() for part, packed in made.items()})
    shutil.rmtree(unfinished)
    return made


def _members(record: Any, key: str, pictures_as: Pictures, columns: Columns | None, notes: Counter[str]) -> dict[str, bytes]:
    """The files of a sample.

    Raises:
        BadSample: training would refuse it.
    """
    if isinstance(record, BadSample):
        raise record
    made = canonical(record, columns)
    moving = made.pop("videos")
    sources = made.pop("images") or ([] if moving else picture_by_number(made, pictures_as.base))
    if not sources and not moving:
        refuse_unread_picture(made)
    pictures = [read_picture(pictures_as, source, notes) for source in sources]
    videos, made = read_videos(pictures_as, moving, made, notes)
    notes["crowds"] += made.pop("crowds", 0) if isinstance(made.get("crowds"), int) else 0
    if "messages" not in made and len(pictures) != 1 and not (len(videos) == 1 and "captions" in made):
        raise BadSample(f"no text with turns, and {len(pictures)} pictures; expected one picture with its captions or objects")
    made = with_sizes(made, [before for _, _, before in pictures], notes)
    if "messages" not in made and len(made.get("captions", ())) == 1:
        made["caption"] = made.pop("captions")[0]
    if not pictures and not videos:
        notes["no picture"] += 1
    if isinstance(made.get("split"), str):
        notes[f"split {made['split'][:40]}"] += 1
    files = {**_numbered([(kind, data) for kind, data, _ in pictures]), **_numbered(videos), "json": _as_json(made, notes)}
    outline({"__key__": key, **files}, max_image_pixels=MAX_PIXELS, caption_prompt="")  # as training will
    notes.update(f"unread {kind}: {name}" for kind, name in notes_of(files, made, record))
    return files


def _numbered(files: list[tuple[str, bytes]]) -> dict[str, bytes]:
    return {(f"{number}.{kind}" if len(files) > 1 else kind): data for number, (kind, data) in enumerate(files)}


def _as_json(made: dict[str, Any], notes: Counter[str]) -> bytes:
    kept = {}
    for key, value in made.items():
        if isinstance(value, bytes | bytearray) or hasattr(value, "__array__") or (isinstance(value, dict) and _is_file(value)):
            notes[f"key {key}"] += 1
        else:
            kept[key] = value
    try:
        return json.dumps(kept, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError:
        raise BadSample("its text has half of a surrogate pair, which is no character; mend or remove it") from None
    except (ValueError, RecursionError) as error:
        raise BadSample(f"it cannot be written as JSON ({error})") from None


def _is_file(value: dict[str, Any]) -> bool:
    return isinstance(value.get("bytes"), bytes)
