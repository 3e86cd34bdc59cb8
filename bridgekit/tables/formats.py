"""Reading table files (CSV, TSV, JSON, JSON Lines, Parquet, Arrow) as columns of cells, with row numbers for messages."""

from __future__ import annotations

import codecs
import csv
import io
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from bridgekit.errors import BridgekitError
from bridgekit.items import EXTENSIONS
from bridgekit.pairs import Column, SetAside
from bridgekit.storage.bounded import OutOfBounds, open_regular, parse_json, read_bounded, regular_size, why_no_json
from bridgekit.tables.arrow import ArrowFile, column_of_text

MAX_TABLE = 4 << 30  # bytes
MAX_JSON = 512 << 20  # bytes of a JSON table, which is parsed at once
MAX_ROW = 16 << 20  # characters of a row of CSV or JSON Lines
MAX_CELLS, MAX_COLUMNS = 200_000_000, 1 << 14  # of a CSV
_CHUNK = 1 << 16  # rows of a CSV that are converted at a time
FILL = "add a header with column names, and rows"  # remedy for an empty table
ARROW = (".parquet", ".arrow", ".feather")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", *ARROW)
JSON_ROW = '{"audio": "a.wav", "text": "a dog barks"}'


@dataclass(frozen=True)
class Cells:
    """A column of a table file.

    Arguments:
        column: its cells: stripped text, with numbers as text, or the items that are in the table itself.
        rows: if cells are lists, the 0-based index of each cell's row; else None: a cell per row.
    """

    column: Column[Any]
    rows: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Records:
    """The contents of a table file.

    Arguments:
        names: its columns, in the file's order.
        rows: n row numbers for messages.
        column: maps a column name to its cells. Raises BridgekitError if a cell is neither text, a number nor a list of these.
        features: column to the type that Hugging Face's `datasets` gave it: `Image`, `Audio`, `ClassLabel`, `Value`, ...
        folders: the folder that the paths in each row are relative to; None if it is that of the table for all rows.
        set_aside: rows that are unusable already.
    """

    names: Sequence[str]
    rows: Sequence[int]
    column: Callable[[str], Cells]
    features: Mapping[str, str] = field(default_factory=dict)
    folders: Column[Path] | None = None
    set_aside: tuple[SetAside, ...] = ()


def read_records(path: Path) -> Records:
    """Open a table file.

    Raises:
        BridgekitError: the format is not supported, or the file is malformed or not UTF-8.
        OSError, OutOfBounds: it cannot be read, or is not a regular file.
    """
    suffix = path.suffix.lower()
    if suffix == ".txt":  # as some data sets name their CSV
        head = read_utf8(path).partition("\n")[0]
        if "\t" in head or "," in head:
            return _read_delimited(path, "\t" if "\t" in head else ",")
    if suffix == ".tar":
        remedy = f"name WebDataset shards as 'webdataset:{path}' (plugins/bridgekit-datasets)"
        raise BridgekitError("this is an archive, not a table", where=str(path), remedy=remedy)
    if suffix not in TABLES:
        kind = next((modality for modality, endings in EXTENSIONS.items() if suffix[1:] in endings), None)
        what = f"cannot read a table from {suffix or 'a file without an extension'}"
        if kind:
            what = f"this is a file of {kind}, not a table"
        remedy = f"give a folder, or a table: {', '.join(TABLES)}" if kind else f"save it as one of {', '.join(TABLES)}"
        raise BridgekitError(what, where=str(path), remedy=remedy)
    if suffix in ARROW:
        return _read_arrow(path)
    if suffix in (".csv", ".tsv"):
        return _read_delimited(path, "," if suffix == ".csv" else "\t")
    return _read_json(path) if suffix == ".json" else _read_json_lines(path)


def _read_delimited(path: Path, delimiter: str) -> Records:
    # Not pyarrow's reader, which silently merges all rows after an unclosed quote into one cell.
    csv.field_size_limit(MAX_ROW)
    names: list[str] = []
    columns: list[_Cells] = []
    rows = array("q")
    row = 0
    try:
        with _Lines.of(path) as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for row, cells in enumerate(reader, 1):
                lines.taken = 0
                record = [cell.strip() for cell in cells]
                if not any(record):
                    continue
                if not names:
                    names = record
                    if len(names) > MAX_COLUMNS:
                        raise _bad_row(path, row, f"the header has over {MAX_COLUMNS:,} columns", "keep those that are needed")
                    columns = [_Cells() for _ in names]
                elif len(record) != len(names):
                    what = f"the row has {len(record)} cells, but the header has {len(names)}"
                    remedy = 'put cells that contain commas, tabs or line breaks in "double quotes"'
                    if len(names) == 1 and any(mark in names[0] for mark in ";|\t"):
                        remedy = "separate the cells with commas (.csv) or tabs (.tsv)"
                    raise _bad_row(path, row, what, remedy)
                else:
                    rows.append(row)
                    if len(rows) * len(names) > MAX_CELLS:
                        raise _bad_row(path, row, f"the table has over {MAX_CELLS:,} cells", "split it into smaller tables")
                    for cell, texts in zip(record, columns, strict=True):
                        texts.add(cell)
    except csv.Error as error:
        what = 'a double quote (") is never closed' if "end of data" in str(error) else f"the row is malformed ({error})"
        remedy = 'put the cell in "double quotes", and write each double quote inside it twice ("")'
        if "field limit" in str(error):
            what = f"a cell has over {MAX_ROW:,} characters, or an earlier quote is never closed"
            remedy = 'shorten the cell, or remove a stray double quote (")'
        raise _bad_row(path, row + 1, what, remedy) from None
    except UnicodeDecodeError:
        raise _not_utf8(path, _first_bad_line(path)) from None

    @cache
    def column(name: str) -> Cells:
        return Cells(columns[names.index(name)].read(f"{path}, column {name}"))

    return Records(names, rows, column)


class _Lines:
    """The lines of a text file, within bounds. `csv.reader` takes several for a row whose cells have line breaks.

    Arguments:
        file: in UTF-8, open for reading.
        size: its bytes.
        most: the characters that may be taken; whoever starts a new row sets `taken` to 0.
    """

    def __init__(self, file: TextIO, size: int, most: int) -> None:
        self._file, self._left, self._most = file, size, most
        self.taken = 0

    @classmethod
    @contextmanager
    def of(cls, path: Path, newline: str = "") -> Iterator[_Lines]:
        """Open a table file; see `open` for `newline`.

        Raises:
            OutOfBounds: it is larger than `MAX_TABLE`, or not a regular file.
        """
        with open_regular(path) as file:
            size = regular_size(file.fileno())
            if size > MAX_TABLE:
                raise OutOfBounds(f"it has {size:,} bytes, over {MAX_TABLE:,} bytes")
            yield cls(io.TextIOWrapper(file, "utf-8-sig", newline=newline), size, MAX_ROW)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self._most + 1)
        self.taken += len(line)
        self._left -= len(line)
        if self.taken > self._most:
            raise csv.Error("field limit")
        if self._left < 0:  # for example, files in /proc claim to have 0 bytes
            raise OutOfBounds("it grew while being read, or does not report its size")
        if not line:
            raise StopIteration
        return line


class _Cells:
    """A column of text in Arrow, to which cells are added one by one. Of equal cells in a chunk, one is kept."""

    def __init__(self) -> None:
        self._chunks: list[Any] = []
        self._cells: list[str | None] = []
        self._size = 0

    def add(self, cell: str) -> None:
        """Add a cell; an empty one is missing."""
        self._cells.append(cell or None)
        self._size += len(cell)
        if len(self._cells) >= _CHUNK or self._size >= MAX_ROW:
            self._finish()

    def _finish(self) -> None:
        import pyarrow as pa

        self._chunks.append(pa.array(self._cells, pa.large_string()).dictionary_encode())
        self._cells, self._size = [], 0

    def read(self, where: str) -> Column[str]:
        """All cells. Raises BridgekitError if the distinct ones are too large."""
        if self._cells:
            self._finish()
        return column_of_text(self._chunks, where)[0]


def _read_json_lines(path: Path) -> Records:
    rows: list[tuple[int, dict[str, Any]]] = []
    remedy = f"write one JSON object per line, like {JSON_ROW}"
    for row, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, limit=MAX_ROW, lenient=True)
        except ValueError as error:
            raise _bad_row(path, row, f"the row is not valid JSON ({why_no_json(error)})", remedy) from None
        if not isinstance(value, dict):
            raise _bad_row(path, row, "the row is not a JSON object", remedy)
        rows.append((row, value))
    return records_of(rows, str(path))


def _read_json(path: Path) -> Records:
    """A JSON array of objects, or an object with one such array. Its rows are counted from 1."""
    remedy = f"write an array of objects, like [{JSON_ROW}]"
    try:
        value = parse_json(read_utf8(path, MAX_JSON), lenient=True)
    except ValueError as error:
        raise BridgekitError(f"the table is not valid JSON ({why_no_json(error)})", where=str(path), remedy=remedy) from None
    arrays = [each for each in (value.values() if isinstance(value, dict) else [value]) if isinstance(each, list)]
    rows = arrays[0] if len(arrays) == 1 else None
    if rows is None or not all(isinstance(row, dict) for row in rows):
        raise BridgekitError("the table is not a JSON array of objects", where=str(path), remedy=remedy)
    return records_of(list(enumerate(rows, 1)), str(path))


def records_of(rows: Sequence[tuple[int, Mapping[str, Any]]], where: str) -> Records:
    """Records of numbered rows, each a mapping from column to a text, a number, or a list of these."""

    # Columns are built on demand: if every row had different keys, all of them would have n columns of n cells.
    def column(name: str) -> Cells:
        values = [value.get(name) for _, value in rows]
        places = (f"{where}, row {row}, column {name}" for row, _ in rows)
        if not any(isinstance(value, list) for value in values):
            return Cells(Column.of(_as_cell(value, place) for value, place in zip(values, places, strict=True)))
        lists = [[_as_cell(each, place) for each in _as_list(value)] for value, place in zip(values, places, strict=True)]
        return Cells(Column.of(cell for each in lists for cell in each), np.repeat(np.arange(len(lists)), [*map(len, lists)]))

    return Records(list(dict.fromkeys(name for _, value in rows for name in value)), [row for row, _ in rows], column)


def _as_list(value: Any) -> Iterable[Any]:
    """The cells of a row: a list's elements, or their `raw` texts if they are objects. An empty list is a missing cell."""
    if not isinstance(value, list):
        return [value]
    return [each["raw"] if isinstance(each, dict) and "raw" in each else each for each in value] or [None]


def _read_arrow(path: Path) -> Records:
    open_regular(path).close()  # the decoder would wait on a named pipe
    if not path.stat().st_size:
        raise BridgekitError("the table is empty", where=str(path), remedy=FILL)
    file = ArrowFile(path)
    kinds = dict(zip(file.names, file.kinds, strict=True))

    @cache
    def column(name: str) -> Cells:
        if kinds[name] == "bytes":
            return Cells(file.blobs(name))
        if kinds[name] not in ("text", "texts"):
            raise _no_cell(kinds[name], f"{path}, column {name}")
        return Cells(*file.text(name))

    return Records(file.names, range(1, file.rows + 1), column, file.features)


def _as_cell(value: Any, where: str) -> str | None:
    """A JSON value as a CSV cell. Missing values are None."""
    if value is None or value != value:
        return None
    if isinstance(value, str | int | float):
        return str(value).strip() or None
    raise _no_cell(type(value).__name__, where)


def _no_cell(kind: str, where: str) -> BridgekitError:
    return BridgekitError(
        f"a cell must be text or a number, not {kind}", where=where, remedy="give a text, or the path of a file"
    )


def read_utf8(path: Path, limit: int = MAX_TABLE) -> str:
    """A table file as text."""
    data = read_bounded(path, limit)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n" if b"\n" in data else b"\r", 0, error.start) + 1
        raise _not_utf8(path, row) from None


def _first_bad_line(path: Path) -> int:
    """The 1-based line of the first byte that is not UTF-8."""
    decoder, lines, returns = codecs.getincrementaldecoder("utf-8")(), 0, 0
    with open_regular(path) as file:
        while True:
            data = file.read(1 << 20)
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                data = error.object[: error.start]
                return 1 + (lines + data.count(b"\n") or returns + data.count(b"\r"))
            lines, returns = lines + data.count(b"\n"), returns + data.count(b"\r")
            if not data:
                return 1 + (lines or returns)


def _not_utf8(path: Path, row: int) -> BridgekitError:
    return _bad_row(path, row, "the table is not valid UTF-8", "save the table as UTF-8")


def _bad_row(path: Path, row: int, what: str, remedy: str) -> BridgekitError:
    return BridgekitError(what, where=f"{path}, row {row}", remedy=remedy)
