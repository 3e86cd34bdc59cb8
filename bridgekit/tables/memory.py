"""Python objects as tables: DataFrames, Arrow tables, `datasets.Dataset`, lists of tuples or dicts, dicts of lists."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bridgekit.decoding.tables import blob_cells, column_kind, text_cells
from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.items import Blob, Item
from bridgekit.media import as_item, modality_of
from bridgekit.pairs import Column
from bridgekit.tables.arrow import column_of_text
from bridgekit.tables.formats import Cells, Records

TAKEN = "a path, a DataFrame, an Arrow table, a datasets.Dataset, a list of tuples or dicts, a dict of lists, or Pairs"


def name_of_python(source: object) -> str:
    """What to call a table in memory, in messages and in a bridge's provenance."""
    return f"a {type(source).__name__} in memory"


def records_of_python(source: Any) -> Records:
    """The columns of a table in memory. Cells are objects until `python_items` makes items of them.

    Raises:
        BridgekitError: the object is no table.
    """
    module = type(source).__module__.partition(".")[0]
    if isinstance(source, Mapping) and source and module == "datasets":  # a DatasetDict
        from bridgekit.tables.folders import joined

        return joined([(records_of_python(each), Path(), name) for name, each in source.items()])
    if module == "datasets" and hasattr(source, "column_names"):
        if not hasattr(source, "num_rows"):
            what = "a streamed data set is opened by its name, as in datasets:org/name,split=train"
            raise BridgekitError(what, where=name_of_python(source), remedy="give the name, or load it without streaming")
        return _of_dataset(source)
    if module == "polars":
        source = source.to_arrow()
    if "pyarrow" in sys.modules and isinstance(source, sys.modules["pyarrow"].Table):
        return _of_arrow(source, {})
    if module == "pandas" and hasattr(source, "columns"):
        source = {str(name): [None if _is_missing(cell) else cell for cell in source[name]] for name in source.columns}
    if isinstance(source, Mapping):
        return _of_columns({str(name): list(cells) for name, cells in source.items()}, source)
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return _of_rows(source)
    raise _no_table(source)


def _no_table(source: object, why: str = "") -> BridgekitError:
    return BridgekitError(f"cannot read a table from a {type(source).__name__}{why}", remedy=f"give {TAKEN}")


def _is_missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and cell != cell)


def _of_rows(rows: Sequence[Any]) -> Records:
    if not rows:
        raise _no_table(rows, " without rows")
    if all(isinstance(row, Mapping) for row in rows):
        names = list(dict.fromkeys(str(name) for row in rows for name in row))
        return _of_columns({name: [row.get(name) for row in rows] for name in names}, rows)
    width = len(rows[0]) if isinstance(rows[0], list | tuple) else 0
    if not width or not all(isinstance(row, list | tuple) and len(row) == width for row in rows):
        raise _no_table(rows, ": its rows must be tuples of one length, or dicts")
    columns = [[row[at] for row in rows] for at in range(width)]
    names = [next((modality_of(cell) for cell in column if cell is not None), TEXT) for column in columns]
    if len({*names}) < width:
        names = [str(number) for number in range(width)]  # which column is what, the run's sides say
    return _of_columns(dict(zip(names, columns, strict=True)), rows)


def _of_columns(columns: Mapping[str, list[Any]], source: object) -> Records:
    counts = {len(cells) for cells in columns.values()}
    if len(counts) > 1:
        raise _no_table(source, ": its columns have different lengths")

    def column(name: str) -> Cells:
        cells = columns[name]
        if any(isinstance(cell, list) for cell in cells):  # several captions
            lists = [cell if isinstance(cell, list) and cell else [None if isinstance(cell, list) else cell] for cell in cells]
            flat, rows = [cell for each in lists for cell in each], np.repeat(np.arange(len(lists)), [*map(len, lists)])
        else:
            flat, rows = cells, None
        numbers: dict[object, int] = {}  # equal texts and paths are one item, and so is one object in many rows
        keys = [cell if isinstance(cell, str | Path | int | float) else id(cell) for cell in flat]
        codes = [-1 if cell is None else numbers.setdefault(key, len(numbers)) for key, cell in zip(keys, flat, strict=True)]
        first = {code: at for at, code in reversed(list(enumerate(codes)))}
        return Cells(
            Column([_Object(flat[first[code]], first[code], name) for code in range(len(numbers))], np.array(codes, np.int32)),
            rows,
        )

    return Records(list(columns), range(1, max(counts, default=0) + 1), column)


class _Object:
    """A cell that is an object in memory, and where it is."""

    def __init__(self, value: Any, row: int, name: str) -> None:
        self.value, self.where = value, f"row {row + 1}, column {name}"

    def __str__(self) -> str:
        return str(self.value)


def column_is_text(column: Column[Any]) -> bool:
    """Whether a column's first cell is a text."""
    first = column.value(0) if len(column.values) else None
    return isinstance(first.value if isinstance(first, _Object) else first, str)


def python_items(column: Column[Any], modality: str) -> Column[Item | None]:
    """The items of a modality in a column of `records_of_python`.

    Raises:
        BridgekitError: an object cannot be an item of this modality. The message says what can.
    """
    if not len(column.values) or not isinstance(column.values[0], _Object):
        return column
    return Column([as_item(each.value, modality, each.where) for each in column.values], column.codes)


def _of_dataset(dataset: Any) -> Records:
    """A `datasets.Dataset`, whose rows stay where they are: its Arrow table is a memory map, or in memory."""
    features = dataset.features
    labels = {name: feature.names for name, feature in features.items() if type(feature).__name__ == "ClassLabel"}
    records = _of_arrow(dataset.with_format("arrow")[:], labels)
    types = {name: type(feature).__name__ for name, feature in features.items()}
    return Records(records.names, records.rows, records.column, types)


def _of_arrow(table: Any, labels: Mapping[str, Sequence[str]]) -> Records:
    def column(name: str) -> Cells:
        cells = table.column(name)
        kind = column_kind(cells.type)
        if kind == "bytes":
            return Cells(_blobs(cells, name))
        if kind not in ("text", "texts"):
            raise BridgekitError(f"a cell must be text, a number or the bytes of a file, not {kind}", where=f"column {name}")
        return Cells(*column_of_text([text_cells(chunk, labels.get(name)) for chunk in cells.chunks], name))

    return Records(table.column_names, range(1, table.num_rows + 1), column)


def _blobs(cells: Any, name: str) -> Column[Item]:
    """The files in a column of bytes, or of structs of bytes and path."""
    chunks = [blob_cells(chunk) for chunk in cells.chunks]
    starts = np.cumsum([0, *map(len, chunks)])
    at_hand = [np.asarray(chunk.field("bytes").is_valid()) | np.asarray(chunk.field("path").is_valid()) for chunk in chunks]

    def cell(row: int) -> tuple[Any, int]:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        return chunks[number], row - int(starts[number])

    def make(row: int) -> Item:
        chunk, at = cell(row)
        path = chunk.field("path")[at].as_py()
        if not chunk.field("bytes")[at].is_valid:
            return Path(path)
        shown = f" ({path})" if path else ""
        return Blob(f"row {row + 1}, column {name}{shown}", partial(_read, chunk, at))

    mask = np.concatenate(at_hand) if at_hand else np.zeros(0, bool)
    return Column(range(len(mask)), np.where(mask, np.arange(len(mask)), -1), make=make)


def _read(chunk: Any, at: int) -> bytes:
    return chunk.field("bytes")[at].as_py() or b""
