"""Files of records -> records: JSON and JSON lines told apart by content, tables, folders of pictures. A line that cannot be read becomes
a BadSample with file and line; the rest goes on.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from vlm_dist.data.json_text import Twice, read_document, read_object, refuse_twice
from vlm_dist.data.layouts import layout_of
from vlm_dist.data.pack_containers import records_in
from vlm_dist.errors import BadSample, DataError

RECORD_FILES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
NOT_UTF8 = re.compile("[\udc80-\udcff]")
MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
TOKENS = re.compile(r"\ufeff?[^\t]+\.\w+#\d+\t")
NEVER_CLOSED = "unexpected end of data"  # what Python's reader says of a quote without its end
MOST_RETURNS = 100  # to the line behind such a quote; each reads the rest of the file once more
LONGEST_REFERENCE = 64  # characters; in VLMEvalKit's tables a picture of fewer is the index of another row


def read_records(path: Path) -> Iterator[Any]:
    """The records of a file; what it holds decides, not its name.

    Raises:
        DataError: it cannot be read.
    """
    with _binary(path) as file:
        head = file.read(4096)
    if head.startswith(b"\x80") and path.suffix.lower() in (".p", ".pkl", ".pickle"):
        raise DataError(f"data pack: '{path}' is a pickle, which could run any program and is never opened; write it as JSON")
    first = decoded(head, "ignore").lstrip()[:1]
    is_table = path.suffix.lower() in (".csv", ".tsv") or (first not in ("{", "[", "") and path.suffix.lower() not in RECORD_FILES)
    yield from read_table(path) if is_table else read_json(path)


def decoded(data: bytes, errors: str = "strict") -> str:
    """Text of UTF-8, or of UTF-16 or -32 with a byte order mark; without the mark."""
    return data.decode(_encoding(data[:4]), errors)


def _encoding(head: bytes) -> str:
    return next((encoding for mark, encoding in MARKS if head.startswith(mark)), "utf-8")


def _binary(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if is_packed else path.open("rb")  # type: ignore[return-value]


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    """A text file, without its byte order mark; what is no UTF-8 becomes lone surrogates, which `NOT_UTF8` finds."""
    with _binary(path) as file:
        encoding = _encoding(file.read(4))
    return io.TextIOWrapper(_binary(path), encoding, "surrogateescape", newline=newline)


def read_json(path: Path) -> Iterator[Any]:
    """A JSON document, or one a line: lines where the first is whole by itself and others follow."""
    with open_text(path) as file:
        filled = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        first, second = next(filled, None), next(filled, None)
    if first is None:
        return
    is_lines = second is not None and (_is_whole(first[1]) or _is_whole(second[1]))
    if not is_lines and second is not None and path.suffix.lower() in (".jsonl", ".ndjson") and first[1].strip()[0] not in "[{":
        is_lines = True
    if is_lines:
        yield from _read_lines(path)
        return
    with open_text(path) as file:
        text = file.read()
    if found := NOT_UTF8.search(text):
        raise DataError(f"data pack: '{path}' cannot be read: byte {_place(text, found)} is no UTF-8; save it as UTF-8")
    value, has_twice = read_document(text)
    is_line = not isinstance(value, dict | list) and path.suffix.lower() in (".jsonl", ".ndjson")
    if is_line:
        yield value
    else:
        yield from _without_twice(value, path) if has_twice else records_in(value, path)


def _without_twice(value: Any, path: Path) -> Iterator[Any]:
    """The records of a document, but for those in which a key stands twice."""
    if isinstance(value, Twice):
        yield BadSample(f"'{path.name}': {value.reason}")
        if layout_of(value) is not None:
            return
        value = {key: item for key, item in value.items() if key != value.key}  # of records by id, the others
    for record in records_in(value, path) if value else ():
        try:
            refuse_twice(record)
        except BadSample as reason:
            record = reason
        yield record


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _place(text: str, found: re.Match[str]) -> str:
    return f"{found.start():,} ({found[0].encode('utf-8', 'surrogateescape')[0]:#04x})"


def _read_lines(path: Path) -> Iterator[Any]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                if found := NOT_UTF8.search(line):
                    raise BadSample(f"byte {_place(line, found)} of it is no UTF-8")
                value = read_object(line)
            except (ValueError, RecursionError, BadSample) as error:
                yield BadSample(f"'{path.name}' line {number}: {error}")
                continue
            yield from records_in(value, path) if isinstance(value, list) else [value]


def read_table(path: Path) -> Iterator[Any]:
    """Rows of CSV or TSV, by the names in its first line; of cells as large as pictures in base64."""
    csv.field_size_limit(2**31 - 1)
    with open_text(path, newline="") as file:
        header = file.readline()
        file.seek(0)
        if TOKENS.match(header):
            yield from _read_tokens(file)
            return
        delimiter = max("\t,;|", key=header.count) if path.suffix.lower() != ".tsv" else "\t"
        lines = _Lines(file)
        rows = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        names = [name.strip() for name in rows.fieldnames or []]
        rows.fieldnames = names
        if twice := next((name for name in names if name and names.count(name) > 1), None):
            raise DataError(f"data pack: '{path}' has two columns '{twice}'; give one of them another name")
        is_flickr = {"image_name", "comment"} <= set(names)
        found = _rows(rows, lines, path, names)
        yield from _grouped(found) if is_flickr else found


class _Lines:
    """The lines of a table, without its mark; those of the row that is being read can be read again."""

    def __init__(self, file: IO[str]):
        self._file = file
        self._again: deque[str] = deque()
        self._row: list[str] = []
        self.number = 0
        """Of the line read last, from 1."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._file)
        self.number += 1
        self._row.append(line)
        return line.lstrip("\ufeff") if self.number == 1 else line

    def begin_row(self) -> int:
        """The number of the line that is read next."""
        self._row = []
        return self.number + 1

    def return_all_but_first(self) -> None:
        self._again.extendleft(reversed(self._row[1:]))
        self.number -= len(self._row) - 1


def _rows(rows: csv.DictReader, lines: _Lines, path: Path, names: list[str]) -> Iterator[Any]:
    seen: dict[str, str] = {}
    returns = 0
    while True:
        begin = lines.begin_row()
        try:
            row = next(rows, None)
        except csv.Error as error:
            end = lines.number
            if NEVER_CLOSED in str(error):
                if returns < MOST_RETURNS:
                    lines.return_all_but_first()
                    returns += 1
                how = "the lines behind it are read on their own" if begin < end else "write it twice, within quotes, or leave it out"
                yield BadSample(f"'{path.name}' line {begin}: a quote opens a cell and none closes it; {how}")
            else:
                where = f"line {begin}" if begin >= end else f"lines {begin} to {end}"
                yield BadSample(f"'{path.name}' {where}: {error}; a quote within a quoted cell is written twice")
            continue
        if row is None:
            return
        yield _row(rows, row, f"'{path.name}' line {lines.number}", names, seen)


def _read_tokens(file: IO[str]) -> Iterator[Any]:
    """Flickr8k's and Flickr30k's own: `NAME.jpg#0<TAB>caption`."""
    lines = (line.lstrip("\ufeff").rstrip("\r\n").partition("\t") for line in file if line.strip())
    yield from _grouped({"image_name": name.partition("#")[0], "comment": caption} for name, _, caption in lines)


def _grouped(rows: Iterable[Any]) -> Iterator[Any]:
    """The captions of a picture, a row each -> one record."""
    captions: dict[str, list[str]] = {}
    for row in rows:
        if isinstance(row, dict) and row.get("image_name") and row.get("comment"):
            captions.setdefault(row["image_name"], []).append(row["comment"].strip())
        elif isinstance(row, BadSample):
            yield row
    yield from ({"image": name, "captions": texts} for name, texts in captions.items())


def _row(rows: csv.DictReader, row: dict[Any, Any], where: str, names: list[str], seen: dict[str, str]) -> Any:
    if None in row:
        return BadSample(f"{where}: {len(names) + len(row[None])} cells; expected {len(names)}: {', '.join(names)}")
    if rows.reader.dialect.delimiter == "\t" and any(isinstance(cell, str) and "\t" in cell and "\n" in cell for cell in row.values()):
        return BadSample(f"{where}: several rows within quotes; a quote that begins a cell is written twice, within quotes")
    if any(isinstance(cell, str) and NOT_UTF8.search(cell) for cell in row.values()):
        return BadSample(f"{where}: it is no UTF-8; save the table as UTF-8")
    found = {name: cell for name, cell in row.items() if cell not in (None, "") and name}
    picture = found.get("image")
    if picture and "index" in found:
        if len(picture) > LONGEST_REFERENCE:
            seen[found["index"]] = picture
        elif picture in seen:
            found["image"] = seen[picture]
    return found
