"""Reads Parquet and Arrow tables in the calling process. `isolation` runs this in separate processes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridgekit.errors import ItemError

MAX_ROWS = 20_000_000
MAX_BYTES = 1 << 30  # of the cells of one reply, uncompressed
MAX_CELLS = 1 << 26  # elements of lists in one reply
#: More cells of a column than FEW must not be more than this many per byte of the file. Equal cells take next to no bytes. Rows
#: that differ take some: numbers that count up, at best, one for 11 of them.
FEW, PER_BYTE = 100_000, 64
_BATCH = 1 << 14  # rows decoded at a time, fewer if they hold files

#: Facts, as JSON, and pieces of data.
Reply = tuple[dict[str, Any], Iterator[Any]]


def describe_table(path: Path) -> Reply:
    """What is in a table.

    Returns:
        `rows`; `names` of all columns; `kinds`, one for each: `text` (text or numbers), `texts` (lists of these), `bytes`
        (binary, or the files of Hugging Face's Image and Audio columns) or another type, which cannot be read; `features`, the
        types that Hugging Face's `datasets` gave to columns; `bytes`, column to the uncompressed size of its cells, if they are
        files.

    Raises:
        ItemError: it is no such table, is damaged, or claims to be larger than a table may be.
    """
    with _opened(path) as table:
        if table.rows > MAX_ROWS:
            raise _too_large(path, f"has {table.rows:,} rows, over {MAX_ROWS:,}")
        most, size = max(table.rows, table.most_values), path.stat().st_size
        if most > max(FEW, PER_BYTE * size):
            raise _too_large(path, f"has {most:,} cells in a column, but only {size:,} bytes")
        kinds = [column_kind(field.type) for field in table.schema]
        files = [name for name, kind in zip(table.schema.names, kinds, strict=True) if kind == "bytes"]
        return {
            "rows": table.rows,
            "names": table.schema.names,
            "kinds": kinds,
            "features": {name: feature["_type"] for name, feature in table_features(table.schema).items()},
            "bytes": {name: table.size(name) for name in files},
        }, iter(())


def read_cells(path: Path, name: str, start: int, stop: int) -> Reply:
    """The cells of a column in rows [start, stop): an Arrow stream of text, lists of text, or bytes. Text is stripped.

    Raises:
        ItemError: the table is damaged, or the cells are too large.
    """
    import pyarrow as pa

    with _opened(path) as table:
        labels = table_features(table.schema).get(name, {}).get("names")
        is_file = column_kind(table.schema.field(name).type) == "bytes"
        chunks, size, count = [], 0, 0
        for cells in table.cells(name, start, stop):
            cleaned = blob_cells(cells).field("bytes") if is_file else text_cells(cells, labels)
            size += cleaned.nbytes
            count += len(cleaned.values) if pa.types.is_large_list(cleaned.type) else 0
            if count > MAX_CELLS:
                raise _too_large(path, f"has over {MAX_CELLS:,} cells in {stop - start:,} rows")
            if size > MAX_BYTES:  # metadata counts a repeated text only once
                raise _too_large(path, f"has {stop - start:,} rows that unpack to over {MAX_BYTES >> 30} GB")
            chunks.append(cleaned)
    return {}, iter([_stream(pa.chunked_array(chunks, chunks[0].type if chunks else pa.null()))])


def find_blobs(path: Path, name: str) -> Reply:
    """Where the files of a column are, without reading them if the table counts its missing cells.

    Returns:
        an Arrow stream of structs: `present`, whether the cell has bytes, and `path`, its file name or null.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    with _opened(path) as table:
        kind = table.schema.field(name).type
        is_struct = pa.types.is_struct(kind)
        has_path = is_struct and any(field.name == "path" for field in kind)
        names = [text_cells(cells) for cells in table.cells(name, 0, table.rows, "path")] if has_path else []
        paths = (
            pa.chunked_array(names, pa.large_string()).combine_chunks() if names else pa.nulls(table.rows, pa.large_string())
        )
        if table.missing(f"{name}.bytes" if is_struct else name) == 0:
            present = pa.array(np.ones(table.rows, bool))
        else:
            valid = [pc.is_valid(blob_cells(cells).field("bytes")) for cells in table.cells(name, 0, table.rows)]
            present = pa.chunked_array(valid, pa.bool_()).combine_chunks() if valid else pa.array([], pa.bool_())
    found = pa.StructArray.from_arrays([present, paths], ["present", "path"])
    return {}, iter([_stream(pa.chunked_array([found]))])


# ---- the two formats


class _Parquet:
    """An open Parquet file."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(path)
        self._metadata = self._file.metadata
        self.schema, self.rows = self._file.schema_arrow, self._metadata.num_rows
        self._groups = [self._metadata.row_group(number) for number in range(self._metadata.num_row_groups)]

    @property
    def most_values(self) -> int:
        """The most cells that any column claims to have; elements of lists are counted."""
        counts = [[group.column(number).num_values for number in range(group.num_columns)] for group in self._groups]
        return max(map(sum, zip(*counts, strict=True)), default=0)

    def _chunks(self, name: str) -> Iterator[Any]:
        """The metadata of a column, or of one of its fields, in every row group."""
        for group in self._groups:
            for number in range(group.num_columns):
                chunk = group.column(number)
                if chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}."):
                    yield chunk

    def size(self, name: str) -> int:
        return sum(chunk.total_uncompressed_size for chunk in self._chunks(name))

    def missing(self, name: str) -> int | None:
        counts = [chunk.statistics.null_count if chunk.is_stats_set else None for chunk in self._chunks(name)]
        return None if None in counts else sum(count or 0 for count in counts)

    def cells(self, name: str, start: int, stop: int, field: str | None = None) -> Iterator[Any]:
        first, wanted = 0, []  # the row groups that these rows are in
        before = None
        for number, group in enumerate(self._groups):
            if first < stop and first + group.num_rows > start:
                before = first if before is None else before
                wanted.append(number)
            first += group.num_rows
        at = before or 0
        rows = _BATCH if field or not self.rows else max(1, min(_BATCH, _BATCH * 4096 * self.rows // max(1, self.size(name))))
        column = f"{name}.{field}" if field else name
        batches = (
            self._file.iter_batches(batch_size=rows, row_groups=wanted, columns=[column], use_threads=False) if wanted else ()
        )
        for batch in batches:
            cells = batch.column(0)
            yield _field(cells.slice(max(0, start - at), max(0, stop - max(at, start))), field)
            at += len(cells)
            if at >= stop:
                return


class _Arrow:
    """An open Arrow file, of either of its two formats; `datasets` writes the one without a footer."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        source = pa.memory_map(str(path))
        try:
            reader = pa.ipc.open_file(source)
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            self._batches = list(reader)
        self.schema, self.rows = reader.schema, sum(batch.num_rows for batch in self._batches)
        self.most_values = self.rows  # its lists are bounded where they are read

    def size(self, name: str) -> int:
        return sum(batch.column(name).nbytes for batch in self._batches)

    def missing(self, name: str) -> int | None:
        column, _, field = name.partition(".")
        return sum(int(_field(batch.column(column), field or None).null_count) for batch in self._batches)

    def cells(self, name: str, start: int, stop: int, field: str | None = None) -> Iterator[Any]:
        at = 0
        for batch in self._batches:
            cells = batch.column(name)
            if at < stop and at + len(cells) > start:
                part = cells.slice(max(0, start - at), max(0, stop - max(at, start)))
                part.validate(full=True)
                yield _field(part, field)
            at += len(cells)


def _field(cells: Any, field: str | None) -> Any:
    """Cells, or a field of structs: null where the struct is."""
    import pyarrow.compute as pc

    return cells if field is None else pc.struct_field(cells, field)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Parquet | _Arrow]:
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    kind = "a Parquet file" if is_parquet or path.suffix.lower() == ".parquet" else "an Arrow file"
    try:
        yield _Parquet(path) if is_parquet else _Arrow(path)
    except (MemoryError, ItemError):
        raise
    except Exception as error:  # pyarrow raises errors of its own, OSError, KeyError and UnicodeDecodeError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ItemError(f"this is not {kind}, or it is damaged ({reason})", where=str(path), remedy="write it again") from None


# ---- cells


def column_kind(kind: Any) -> str:
    """The kind of a column of this Arrow type: see `describe_table`."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    if any(test(kind) for test in plain):
        return "text"
    if types.is_list(kind) or types.is_large_list(kind):
        return "texts" if column_kind(kind.value_type) == "text" else str(kind)[:100]
    names = {field.name: field.type for field in kind} if types.is_struct(kind) else {"bytes": kind}
    has_bytes = "bytes" in names and (types.is_binary(names["bytes"]) or types.is_large_binary(names["bytes"]))
    return "bytes" if has_bytes and set(names) <= {"bytes", "path"} else str(kind)[:100]


def table_features(schema: Any) -> dict[str, dict[str, Any]]:
    """The types that `datasets` gave to columns; what does not look like one is left out."""
    with contextlib.suppress(Exception):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: each for name, each in features.items() if isinstance(each, dict) and isinstance(each.get("_type"), str)}
    return {}


def text_cells(cells: Any, labels: Sequence[str] | None = None) -> Any:
    """An Arrow array of text, numbers or lists of these as stripped text, null if empty. `labels` name numbered classes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        return _lists_of_text(cells)
    if pa.types.is_dictionary(cells.type):
        cells = cells.cast(cells.type.value_type)
    if not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        cells = pa.array([_text(value, labels) for value in cells.to_pylist()], pa.large_string())
    text = pc.utf8_trim_whitespace(cells.cast(pa.large_string()))
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.large_string()), text)


def blob_cells(cells: Any) -> Any:
    """An Arrow array of binary, or of structs of bytes and path, as structs of both."""
    import pyarrow as pa

    is_struct = pa.types.is_struct(cells.type)
    paths = [_field(cells, field.name) for field in (cells.type if is_struct else ()) if field.name == "path"]
    content = (_field(cells, "bytes") if is_struct else cells).cast(pa.large_binary())
    path = paths[0].cast(pa.large_string()) if paths else pa.nulls(len(cells), pa.large_string())
    return pa.StructArray.from_arrays([content, path], ["bytes", "path"])


def _text(value: Any, labels: Sequence[str] | None) -> str | None:
    """A number as text: as Python writes it, or the name of its class."""
    if value is None or value != value:
        return None
    if labels and isinstance(value, int) and 0 <= value < len(labels):
        return str(labels[value])
    return str(value)


def _lists_of_text(cells: Any) -> Any:
    import pyarrow as pa

    lists = cells.cast(pa.large_list(cells.type.value_type))
    first, last = lists.offsets[0].as_py(), lists.offsets[-1].as_py()
    values = text_cells(lists.values.slice(first, last - first))
    offsets = pa.array(np.asarray(lists.offsets) - first, pa.int64(), mask=np.append(np.asarray(lists.is_null()), False))
    return pa.LargeListArray.from_arrays(offsets, values)


def _stream(cells: Any) -> Any:
    """An Arrow stream of one column."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("cells", cells.type)])) as writer:
        writer.write_table(pa.table([cells], ["cells"]))
    return memoryview(sink.getvalue())


def _too_large(path: Path, claim: str) -> ItemError:
    return ItemError(
        f"the table {claim}, or claims to", where=str(path), remedy="split it into smaller tables, or write it again"
    )
