"""Reading table files (CSV, TSV, JSON Lines, Parquet) as text cells, with row numbers for messages."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridgekit.decoding.isolation import decode
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.storage.bounded import open_regular, parse_json, read_bounded, why_no_json

MAX_TABLE = 4 << 30  # bytes
MAX_ROW = 16 << 20  # characters of a JSON Lines row or a CSV cell
FILL = "add a header with column names, and rows"  # remedy for an empty table
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Records:
    """The contents of a table file.

    Arguments:
        names: its columns, in the file's order.
        rows: n row numbers for messages.
        column: maps a column name to n cells. Raises BridgekitError if a cell is neither text nor a number.
    """

    names: Sequence[str]
    rows: Sequence[int]
    column: Callable[[str], Sequence[str | None]]


def read_records(path: Path) -> Records:
    """Read a whole table file.

    Raises:
        BridgekitError: the format is not supported, or the file is malformed or not UTF-8.
        OSError, OutOfBounds: it cannot be read, or is not a regular file.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise BridgekitError(
            f"cannot read a table from {suffix or 'a file without an extension'}",
            where=str(path),
            remedy=f"save it as one of {', '.join(TABLES)}",
        )
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix in (".csv", ".tsv"):
        return _read_delimited(path, "," if suffix == ".csv" else "\t")
    return _read_json_lines(path)


def _read_delimited(path: Path, delimiter: str) -> Records:
    # Not pyarrow's reader, which silently merges all rows after an unclosed quote into one cell. Since the cells become Python
    # strings, the csv module is no slower.
    csv.field_size_limit(MAX_ROW)
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    records: list[tuple[int, list[str | None]]] = []
    row = 0
    try:
        for row, cells in enumerate(reader, 1):
            record = [cell.strip() or None for cell in cells]
            if not any(record):
                continue
            if not names:
                names = [name or "" for name in record]
            elif len(record) != len(names):
                what = f"the row has {len(record)} cells, but the header has {len(names)}"
                raise _bad_row(path, row, what, 'put cells that contain commas, tabs or line breaks in "double quotes"')
            else:
                records.append((row, record))
    except csv.Error as error:
        what = 'a double quote (") is never closed' if "end of data" in str(error) else f"the row is malformed ({error})"
        remedy = 'put the cell in "double quotes", and write each double quote inside it twice ("")'
        if "field limit" in str(error):
            what = f"a cell has over {MAX_ROW:,} characters, or an earlier quote is never closed"
            remedy = 'shorten the cell, or remove a stray double quote (")'
        raise _bad_row(path, row + 1, what, remedy) from None

    def column(name: str) -> list[str | None]:
        at = names.index(name)
        return [record[at] for _, record in records]

    return Records(names, [row for row, _ in records], column)


def _read_json_lines(path: Path) -> Records:
    rows: list[tuple[int, dict[str, Any]]] = []
    for row, line in enumerate(read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        remedy = 'write one JSON object per line, like {"audio": "a.wav", "text": "a dog barks"}'
        try:
            value = parse_json(line, limit=MAX_ROW, lenient=True)
        except ValueError as error:
            raise _bad_row(path, row, f"the row is not valid JSON ({why_no_json(error)})", remedy) from None
        if not isinstance(value, dict):
            raise _bad_row(path, row, "the row is not a JSON object", remedy)
        rows.append((row, value))
    # Columns are built on demand: if every row had different keys, all of them would have n columns of n cells.
    return Records(
        list(dict.fromkeys(name for _, value in rows for name in value)),
        [row for row, _ in rows],
        lambda name: [_as_cell(value.get(name), f"{path}, row {row}, column {name}") for row, value in rows],
    )


def _read_parquet(path: Path) -> Records:
    cells: dict[str, list[str | None]] = {}

    def gather(answer: dict[str, Any], lines: memoryview) -> dict[str, Any]:
        for line in io.BytesIO(lines):
            for name, values in json.loads(line).items():
                known = cells.setdefault(name, [])
                known += [
                    _as_cell(value, f"{path}, row {row}, column {name}") for row, value in enumerate(values, len(known) + 1)
                ]
        return answer

    open_regular(path).close()  # the decoder would wait on a named pipe
    if not path.stat().st_size:
        raise BridgekitError("the table is empty", where=str(path), remedy=FILL)
    try:
        answer = decode("parquet", path, gather, remedy="write it again")
    except ItemError as error:
        raise BridgekitError(error.what, where=error.where, remedy=error.remedy) from None
    count = max(map(len, cells.values()), default=0)

    def column(name: str) -> Sequence[str | None]:
        if name in answer["unread"]:
            raise _no_cell(answer["unread"][name], f"{path}, column {name}")
        return cells.get(name, [None] * count)

    return Records(answer["names"], range(1, count + 1), column)


def _as_cell(value: Any, where: str) -> str | None:
    """A JSON or Parquet value as a CSV cell. Missing values are None."""
    if value is None or value != value:
        return None
    if isinstance(value, str | int | float):
        return str(value).strip() or None
    raise _no_cell(type(value).__name__, where)


def _no_cell(kind: str, where: str) -> BridgekitError:
    return BridgekitError(
        f"a cell must be text or a number, not {kind}", where=where, remedy="give a text, or the path of a file"
    )


def read_utf8(path: Path) -> str:
    """A table file as text."""
    data = read_bounded(path, MAX_TABLE)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n" if b"\n" in data else b"\r", 0, error.start) + 1
        raise _bad_row(path, row, "the table is not valid UTF-8", "save the table as UTF-8") from None


def _bad_row(path: Path, row: int, what: str, remedy: str) -> BridgekitError:
    return BridgekitError(what, where=f"{path}, row {row}", remedy=remedy)
