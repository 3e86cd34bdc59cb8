"""A table of pairs: columns of matching items, and the rows that were set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

from bridgekit.items import EXTENSIONS as EXTENSIONS
from bridgekit.items import Blob, Item

T = TypeVar("T", covariant=True)

#: Modality to n ids, one per row: rows with the same id hold the same item. Negative if the item is missing.
Content = Mapping[str, "Sequence[int] | npt.NDArray[np.int64]"]


@dataclass(frozen=True)
class SetAside:
    """An excluded row and the reason.

    Arguments:
        row: its number in a spreadsheet (the first data row of a CSV is 2; blank lines count). Parquet rows and files in class
            folders are counted from 1.
        column: the modality of the faulty item.
        item: the path or the beginning of the text.
        reason: one line.
    """

    row: int
    column: str
    item: str
    reason: str


class Column(Sequence[T]):
    """A column of n cells. Only distinct values are stored, so a table of millions of rows takes little more than its text.

    Arguments:
        values: the distinct values: any sequence, or an Arrow array.
        codes: (n,) the index of each cell's value; negative if the cell is missing.
        folder: if given, values are paths relative to it, and cells are `folder / value`.
        make: makes a cell from a value; by default, cells are the values.
    """

    def __init__(
        self,
        values: Any,
        codes: npt.NDArray[np.integer[Any]],
        *,
        folder: Path | None = None,
        make: Callable[[Any], Any] | None = None,
    ) -> None:
        self.values, self.codes, self.folder, self._make = values, codes, folder, make

    @classmethod
    def of(cls, cells: Iterable[Any]) -> Column[Any]:
        """A column of these cells; None is a missing one. A column is returned as it is."""
        if isinstance(cells, Column):
            return cells
        numbers: dict[Any, int] = {}
        codes = [-1 if cell is None else numbers.setdefault(cell, len(numbers)) for cell in cells]
        return Column(list(numbers), np.array(codes, np.int32))

    @classmethod
    def joined(cls, columns: Sequence[Column[T]]) -> Column[T]:
        """The cells of several columns, one after the other."""
        if len(columns) == 1:
            return columns[0]
        if all(column.folder is None and column._make is None for column in columns):
            import pyarrow as pa

            arrays = [
                pa.DictionaryArray.from_arrays(
                    pa.array(column.codes, mask=column.codes < 0), pa.array(column.texts(), pa.large_string())
                )
                for column in columns
            ]
            whole = pa.chunked_array(arrays).unify_dictionaries()
            codes = [np.asarray(chunk.indices.fill_null(-1)) for chunk in whole.chunks]
            return Column(whole.chunk(0).dictionary, np.concatenate(codes))
        starts = np.cumsum([0, *(len(column.values) for column in columns)])

        def make(place: int) -> Any:
            number = int(np.searchsorted(starts, place, side="right")) - 1
            return columns[number].value(place - int(starts[number]))

        codes = [np.where(column.codes < 0, -1, column.codes + start) for column, start in zip(columns, starts, strict=False)]
        return Column(range(int(starts[-1])), np.concatenate(codes), make=make)

    def value(self, code: int) -> Any:
        """The cell with this code."""
        value = self.values[code]
        plain = value.as_py() if hasattr(value, "as_py") else value
        if self._make is not None:
            plain = self._make(plain)
        return plain if self.folder is None else self.folder / plain

    def take(self, indices: npt.NDArray[np.integer[Any]]) -> Column[T]:
        """The cells with these 0-based indices."""
        return Column(self.values, self.codes[indices], folder=self.folder, make=self._make)

    def map(self, change: Callable[[Any], Any]) -> Column[Any]:
        """A column of `change(cell)`, called once for each distinct value."""
        return Column([change(self.value(code)) for code in range(len(self.values))], self.codes)

    @property
    def holds_text(self) -> bool:
        """Whether its values are text as read from a table, rather than items."""
        return self.folder is None and self._make is None and all(isinstance(self.value(0), str) for _ in self.values[:1])

    def texts(self) -> list[str]:
        """The distinct values of a column that holds text."""
        return list(self.values.to_pylist() if hasattr(self.values, "to_pylist") else self.values)

    def firsts(self) -> npt.NDArray[np.int64]:
        """The codes of the distinct cells, in order of their first appearance."""
        codes, first = np.unique(self.codes, return_index=True)
        ordered = codes[np.argsort(first)]
        return np.asarray(ordered[ordered >= 0], np.int64)

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, at: int) -> T: ...

    @overload
    def __getitem__(self, at: slice) -> Column[T]: ...

    def __getitem__(self, at: int | slice) -> T | Column[T]:
        if isinstance(at, slice):
            return self.take(np.arange(len(self))[at])
        code = int(self.codes[at])
        return cast(T, None if code < 0 else self.value(code))  # T includes None where cells are missing

    def __iter__(self) -> Iterator[T]:
        made: dict[int, T] = {}
        for code in self.codes.tolist():
            if code < 0:
                yield None  # type: ignore[misc]
            else:
                if code not in made:
                    made[code] = self.value(code)
                yield made[code]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(other) == len(self) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"Column({shown}{', ...' if len(self) > 3 else ''}; {len(self):,} cells)"


def _items(modality: str, cells: Iterable[Any]) -> Iterable[Any]:
    """Cells as items: objects in memory become `Blob`s."""
    if isinstance(cells, Column) or all(cell is None or isinstance(cell, str | Path | Blob) for cell in cells):
        return cells
    from bridgekit.media import as_item  # imports Pillow, which `bridgekit --help` does not need

    return [
        cell if cell is None or isinstance(cell, str | Path | Blob) else as_item(cell, modality, f"{modality} {number}")
        for number, cell in enumerate(cells, 1)
    ]


@dataclass(frozen=True)
class Pairs:
    """A table with one column per modality; the items in a row belong together.

    Arguments:
        columns: modality to n items, one per row: absolute paths, strings for `text`, or `Blob`s. None if the item is missing.
        source: the table's path or the name of a plugin's source.
        rows: n row numbers for messages, as in `SetAside.row`.
        split: n split names (`train`, `val`; any other is a test split), or None if the table defines none.
        group: n labels, or None. All items of a group match each other.
        set_aside: rows found unusable while reading.

    Any sequences may be given; they are kept as `Column`s.
    """

    columns: Mapping[str, Sequence[Item | None]]
    source: str
    rows: Sequence[int]
    split: Sequence[str] | None = None
    group: Sequence[str] | None = None
    set_aside: tuple[SetAside, ...] = field(default=())

    def __post_init__(self) -> None:
        columns = {name: Column.of(_items(name, cells)) for name, cells in self.columns.items()}
        object.__setattr__(self, "columns", columns)
        for name in ("split", "group"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Column.of(getattr(self, name)))
        if not isinstance(self.rows, Column):
            object.__setattr__(self, "rows", Column(np.asarray(self.rows, np.int64), np.arange(len(self.rows)), make=int))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self.columns)

    def column(self, modality: str) -> Column[Item | None]:
        """A column, by name."""
        column = self.columns[modality]
        assert isinstance(column, Column)
        return column

    def take(self, indices: Iterable[int]) -> Pairs:
        """A table of the rows with these 0-based indices, in this order. It keeps `set_aside`."""
        chosen = np.fromiter(indices, np.int64) if not isinstance(indices, np.ndarray) else indices

        def taken(cells: Any) -> Any:
            return None if cells is None else cells.take(chosen)

        columns = {modality: taken(cells) for modality, cells in self.columns.items()}
        return replace(self, columns=columns, rows=taken(self.rows), split=taken(self.split), group=taken(self.group))
