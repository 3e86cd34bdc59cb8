"""Parquet and Arrow files, read by the decoders: columns of text, and files in cells, which are read when they are needed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridgekit.decoding.isolation import decode
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.items import Blob
from bridgekit.pairs import Column

AGAIN = "write it again"  # remedy for a damaged table
MAX_TABLE = 2 << 30  # bytes of a column's distinct texts
_TEXT_ROWS = 1 << 18  # rows of text that are read at a time
_PART_BYTES = 16 << 20  # bytes of text in which equal ones are looked for at a time
_BLOB_BYTES = 64 << 20  # bytes of files that are read at a time: they are next to each other in a table
#: Bytes of cells that are kept in memory. Encoding takes files in the table's order, except within a window of
#: `bridgekit.latents.encode.WINDOW_BYTES`.
_KEPT_BYTES = 768 << 20


class ArrowFile:
    """A Parquet or Arrow file, as `bridgekit.decoding.tables` describes it.

    Raises:
        BridgekitError: it is no such file, is damaged, or is too large.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        facts = self._ask("table", lambda facts, _: facts)
        self.rows: int = facts["rows"]
        self.names: list[str] = facts["names"]
        self.kinds: list[str] = facts["kinds"]
        self.features: dict[str, str] = facts["features"]
        self._bytes: dict[str, int] = facts["bytes"]

    def _ask(self, operation: str, finish: Any, **options: object) -> Any:
        try:
            return decode(operation, self._path, finish, remedy=AGAIN, **options)
        except ItemError as error:
            raise BridgekitError(error.what, where=error.where, remedy=error.remedy) from None

    def text(self, name: str) -> tuple[Column[str], NDArray[np.int64] | None]:
        """A column of text, and, if its cells are lists, the index of each cell's row. An empty list is a missing cell."""
        ranges = ((start, min(start + _TEXT_ROWS, self.rows)) for start in range(0, self.rows, _TEXT_ROWS))
        chunks = (self._ask("cells", _copied, name=name, start=start, stop=stop) for start, stop in ranges)
        return column_of_text(chunks, f"{self._path}, column {name}")

    def blobs(self, name: str) -> Column[Blob | Path]:
        """A column of files: `Blob`s, or paths where cells name a file next to the table instead of having its bytes."""
        found = self._ask("places", _copied, name=name)
        present, paths = np.asarray(found.field("present")), found.field("path")
        at_hand = present | np.asarray(paths.is_valid())
        per_row = max(1, self._bytes[name] // max(1, self.rows))
        cells = _Cells(self._path, self.rows, name, max(1, _BLOB_BYTES // per_row))

        def make(row: int) -> Blob | Path:
            path: str = paths[row].as_py()
            if not present[row]:
                return self._path.parent.absolute() / path
            shown = f" ({path})" if path else ""
            return Blob(f"{self._path}, row {row + 1}, column {name}{shown}", partial(cells.read, row))

        return Column(range(self.rows), np.where(at_hand, np.arange(self.rows), -1), make=make)


def column_of_text(chunks: Iterable[Any], where: str) -> tuple[Column[str], NDArray[np.int64] | None]:
    """A column of Arrow arrays of text, or of lists of it: see `ArrowFile.text`."""
    import pyarrow as pa

    texts, codes, rows, count, size, distinct = [], [], [], 0, 0, 0
    for cells in chunks:
        before, count = count, count + len(cells)
        if pa.types.is_large_list(cells.type):
            cells, own = _flattened(cells)
            rows.append(before + own)
        encoded = cells.cast(pa.large_string()).dictionary_encode()
        own_codes = np.asarray(encoded.indices.fill_null(-1), np.int32)
        codes.append(np.where(own_codes < 0, -1, own_codes + distinct))
        texts.append(encoded.dictionary)
        distinct += len(texts[-1])
        size += texts[-1].nbytes
        if size > MAX_TABLE:
            raise BridgekitError(
                f"the texts take over {MAX_TABLE >> 30} GB", where=where, remedy="split the table into smaller ones"
            )
    if not texts:
        return Column([], np.zeros(0, np.int32)), None
    values, numbers = _merged(texts, parts=1 + size // _PART_BYTES)
    joined = np.concatenate(codes)
    there = joined >= 0
    joined[there] = numbers[joined[there]]
    return Column(values, joined), np.concatenate(rows) if rows else None


def _merged(texts: list[Any], parts: int) -> tuple[Any, NDArray[np.int32]]:
    """The distinct texts of several Arrow arrays, which are given up, and the number of each of their texts among these.

    Finding equal texts takes three times their memory, so it is done in parts: equal texts have equal lengths.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    whole = pa.chunked_array(texts)
    texts.clear()
    part_of = np.asarray(pc.binary_length(whole)) % parts
    numbers, distinct, count = np.zeros(len(whole), np.int32), [], 0
    for part in range(parts):
        there = part_of == part
        found = whole.filter(pa.array(there)).combine_chunks().dictionary_encode()
        numbers[there] = np.asarray(found.indices) + count
        distinct.append(found.dictionary)
        count += len(found.dictionary)
    del whole, found
    pa.default_memory_pool().release_unused()
    return distinct[0] if parts == 1 else pa.chunked_array(distinct), numbers


class _Cells:
    """The bytes of a column, read in runs of rows. The runs that were used last are kept, up to `_KEPT_BYTES`."""

    def __init__(self, path: Path, rows: int, name: str, run: int) -> None:
        self._path, self._rows, self._name, self._run = path, rows, name, run
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes:
        """The bytes in this row.

        Raises:
            ItemError: the table is damaged there.
        """
        number = row // self._run
        with self._lock:  # a run is read once, however many threads want it
            if number not in self._kept:
                start = number * self._run
                stop = min(start + self._run, self._rows)
                self._kept[number] = decode("cells", self._path, _copied, remedy=AGAIN, name=self._name, start=start, stop=stop)
            self._kept.move_to_end(number)
            while len(self._kept) > 1 and sum(cells.nbytes for cells in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
            cells = self._kept[number]
        return cells[row - number * self._run].as_py() or b""


def _copied(_: dict[str, Any], data: memoryview) -> Any:
    """The column of an Arrow stream from a decoder, which is not trusted."""
    import pyarrow as pa

    cells = pa.ipc.open_stream(pa.py_buffer(bytes(data))).read_all().column(0).combine_chunks()
    cells.validate(full=True)
    return cells


def _flattened(lists: Any) -> tuple[Any, NDArray[np.int64]]:
    """The elements of lists, and each one's list. An empty or missing list has one missing element."""
    import pyarrow as pa

    offsets = np.asarray(lists.offsets)
    sizes = np.where(np.asarray(lists.is_null()), 0, np.diff(offsets))
    counts = np.maximum(sizes, 1)
    rows = np.repeat(np.arange(len(lists)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    taken = pa.array(np.repeat(offsets[:-1], counts) + within, mask=np.repeat(sizes, counts) == 0)
    return lists.values.take(taken), rows
