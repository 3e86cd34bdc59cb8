"""Parquet files and WebDataset shards, here or in object storage, in pieces that workers read: a row group, or a shard."""

from __future__ import annotations

import fnmatch
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from bridgekit.decoding.tables import blob_cells, column_kind, table_features, text_cells
from bridgekit.encoders import TEXT, Blob, Item
from bridgekit.errors import BridgekitError, ItemError, one_line
from bridgekit.media import size_hint
from bridgekit.pairs import SetAside
from bridgekit.plugins import not_installed
from bridgekit.tables.folders import walk
from bridgekit.tables.formats import TABLES, Cells, Records
from bridgekit.tables.reading import Table

SHARDS = "webdataset:"
#: Rows of a shard in which its columns are looked for.
PEEKED = 100
#: Uncompressed bytes of cells, and rows, that are read of a row group at a time.
READ_BYTES, READ_ROWS = 32 << 20, 8_192


@dataclass(frozen=True)
class Piece:
    """What a worker reads at a time.

    Arguments:
        url: a path or a URL.
        group: the number of a row group; -1 for a shard.
        first: the number of rows before it in its file.
    """

    url: str
    group: int = -1
    first: int = 0

    def as_json(self) -> str:
        """For `Piece(**json.loads(...))`."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Row:
    """A row as it is read.

    Arguments:
        number: from 1, in its file.
        where: its place, for messages.
        cells: modality to its items: several if the cell is a list of texts. None is a missing item.
        size: bytes of its items.
    """

    number: int
    where: str
    cells: Mapping[str, Sequence[Item | None]]
    size: int


# ---- on the driver


def is_shards(source: str) -> bool:
    """Whether the name of a table is that of WebDataset shards."""
    return source.startswith(SHARDS)


def find_files(source: object) -> list[str] | None:
    """The files of a table that workers can read: absolute paths, or URLs. None if it is another kind of table.

    Arguments:
        source: a Parquet file or a folder of these, or `webdataset:` and shards. Braces and `*` are expanded.

    Raises:
        BridgekitError: there are none, or a URL leads to another kind of table.
    """
    if not isinstance(source, str | Path):
        return None
    pattern, ending = str(source).removeprefix(SHARDS), ".tar" if is_shards(str(source)) else ".parquet"
    if ending == ".tar" and find_spec("bridgekit_datasets") is None:
        raise not_installed("datasets")
    if ending == ".parquet" and "://" not in pattern:
        if Path(pattern).is_dir():
            files = [file for file in walk(Path(pattern).absolute(), links=False) if file.lower().endswith(TABLES)]
            return files if files and all(file.lower().endswith(ending) for file in files) else None
        if not pattern.lower().endswith(ending):
            return None
    try:
        patterns = list(braceexpand(pattern))
    except ValueError:
        raise BridgekitError("the braces do not match", where=pattern, remedy="as in data/{00..99}.parquet") from None
    try:
        urls = [url for each in patterns for url in _expanded(each, ending)]
    except Exception as error:  # file systems raise errors of many kinds
        raise _unreadable(pattern, error) from None
    if not urls:
        raise BridgekitError(
            f"there is no {ending} file", where=pattern, remedy="give a table (.parquet), or shards as webdataset:URL/*.tar"
        )
    return urls


def _expanded(pattern: str, ending: str) -> list[str]:
    """The files of a path or URL that may have `*` in its last part, or be a folder."""
    from pyarrow.fs import FileSelector

    if "://" not in pattern:
        pattern = str(Path(pattern).absolute())
    base, mark, query = pattern.partition("?")
    if base.lower().endswith(ending) and "*" not in base:
        return [pattern]
    folder, _, name = base.rstrip("/").rpartition("/") if "*" in base else (base.rstrip("/"), "", f"*{ending}")
    system, path = resolve(f"{folder}{mark}{query}")
    found = [each.path for each in system.get_file_info(FileSelector(path, recursive="*" not in base)) if each.is_file]
    files = sorted(each for each in found if fnmatch.fnmatchcase(each.rpartition("/")[2], name))
    return [f"{folder}/{file[len(path.rstrip('/')) :].lstrip('/')}{mark}{query}" for file in files]


def resolve(url: str) -> tuple[Any, str]:
    """The pyarrow file system of a path or URL, and the path in it.

    Arrow opens s3, gs, abfs, hdfs and file; fsspec all others, if the package for them is installed.
    """
    from pyarrow import ArrowException, fs

    if "://" not in url:
        return fs.LocalFileSystem(), str(Path(url).absolute())
    try:
        found: tuple[Any, str] = fs.FileSystem.from_uri(url)
        return found
    except (ArrowException, ValueError):
        import fsspec  # type: ignore[import-untyped]

        other, path = fsspec.core.url_to_fs(url)
        return fs.PyFileSystem(fs.FSSpecHandler(other)), path


def as_table(source: str, facts: Mapping[str, Any], columns: Mapping[str, str]) -> Table:
    """A table whose columns are known, but not its rows: to choose sides by, and to check columns."""
    kinds = dict(zip(facts["names"], facts["kinds"], strict=True))

    def column(name: str) -> Cells:
        raise BridgekitError("workers read its cells", where=f"{source}, column {name}")

    records = Records(list(kinds), [], column, facts["features"])
    return Table(source, lambda: records, given=dict(columns))


# ---- on workers


def describe(url: str, shards: bool) -> dict[str, Any]:
    """A file's `names`, `kinds` and `features`, as of `decoding.tables.describe_table`, and the rows of its row groups.

    Raises:
        BridgekitError: it cannot be read.
    """
    if not shards:
        with _parquet(url) as file:
            groups = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
            features = {name: feature["_type"] for name, feature in table_features(file.schema_arrow).items()}
            kinds = [column_kind(field.type) for field in file.schema_arrow]
            return {"names": file.schema_arrow.names, "kinds": kinds, "features": features, "groups": groups}
    kinds_of: dict[str, str] = {}
    try:
        with _opened(url) as file:
            for sample in islice(_samples(file, url), PEEKED):
                kinds_of |= {name: "bytes" if isinstance(value, Blob) else "text" for name, value in sample.items()}
    except tarfile.TarError as error:
        if not kinds_of:
            raise _no_shard(url, error) from None
    return {"names": list(kinds_of), "kinds": list(kinds_of.values()), "features": {}, "groups": []}


def read_rows(piece: Piece, columns: Mapping[str, str]) -> Iterator[Row | SetAside]:
    """The rows of a piece, in order, and what of it cannot be read.

    Arguments:
        piece: which.
        columns: modality to the name of its column.
    """
    number = piece.first
    try:
        for row in _shard_rows(piece, columns) if piece.group < 0 else _parquet_rows(piece, columns):
            number = row.number
            yield row
    except (BridgekitError, tarfile.TarError, OSError) as error:
        reason = error.what if isinstance(error, BridgekitError) else f"cut short or damaged ({one_line(error)})"
        unread = f"row group {piece.group}" if piece.group >= 0 else "the shard"
        yield SetAside(number + 1, next(iter(columns)), piece.url, f"{unread} cannot be read from here on: {reason}")


def _parquet_rows(piece: Piece, columns: Mapping[str, str]) -> Iterator[Row]:
    with _parquet(piece.url) as file:
        metadata = file.metadata.row_group(piece.group)
        labels = {name: feature.get("names") for name, feature in table_features(file.schema_arrow).items()}
        kinds = {name: column_kind(file.schema_arrow.field(name).type) for name in columns.values()}
        chunks = [metadata.column(number) for number in range(metadata.num_columns)]
        size = sum(each.total_uncompressed_size for each in chunks if each.path_in_schema.partition(".")[0] in kinds)
        count = max(1, min(READ_ROWS, READ_BYTES * metadata.num_rows // max(1, size)))
        number = piece.first
        batches = file.iter_batches(count, row_groups=[piece.group], columns=[*kinds], use_threads=False)
        for batch in batches:
            read = {
                modality: _blobs(batch.column(name), piece.url, name, number)
                if kinds[name] == "bytes"
                else text_cells(batch.column(name), labels.get(name)).to_pylist()
                for modality, name in columns.items()
            }
            for at in range(len(batch)):
                number += 1
                yield _row(number, f"{piece.url}, row {number}", {modality: cells[at] for modality, cells in read.items()})


def _blobs(cells: Any, url: str, column: str, before: int) -> list[Blob | None]:
    """The files in a column, named as `bridgekit.tables.arrow` names them. `before` is the number of rows before these."""
    made: list[Blob | None] = []
    for number, cell in enumerate(blob_cells(cells).to_pylist(), before + 1):
        content, path = cell["bytes"], cell["path"]
        where = f"{url}, row {number}, column {column}{f' ({path})' if path else ''}"
        made.append(None if content is None and path is None else Blob(where, partial(_given, content, where)))
    return made


def _given(content: bytes | None, where: str) -> bytes:
    if content is None:
        raise ItemError("the cell names a file, and has no bytes", where=where, remedy="omit --ray, or write the bytes into it")
    return content


def _shard_rows(piece: Piece, columns: Mapping[str, str]) -> Iterator[Row]:
    with _opened(piece.url) as file:
        for number, sample in enumerate(_samples(file, piece.url), 1):
            where = f"{piece.url}, {sample['key']}"
            yield _row(number, where, {modality: sample.get(name) for modality, name in columns.items()})


def _row(number: int, where: str, values: Mapping[str, Any]) -> Row:
    """A row of cells: items, texts and numbers, or lists of texts. A text is no item of another modality."""
    cells: dict[str, list[Item | None]] = {}
    for modality, value in values.items():
        several = (value or [None]) if isinstance(value, list) else [value]
        items = [str(each).strip() or None if isinstance(each, str | int | float) else each for each in several]
        cells[modality] = [each if isinstance(each, str) == (modality == TEXT) else None for each in items]
    return Row(number, where, cells, sum(size_hint(each) for items in cells.values() for each in items if each is not None))


def _samples(file: Any, url: str) -> Iterator[dict[str, Any]]:
    from bridgekit_datasets.shards import samples_in

    return samples_in(file, url)


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    """A file, open for reading forwards."""
    try:
        system, path = resolve(url)
        file = system.open_input_stream(path, buffer_size=1 << 20, compression=None)
    except Exception as error:  # file systems raise errors of many kinds
        raise _unreadable(url, error) from None
    with file:
        yield file


@contextmanager
def _parquet(url: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    try:
        system, path = resolve(url)
        with system.open_input_file(path) as file:
            yield pq.ParquetFile(file)
    except BridgekitError:
        raise
    except Exception as error:  # as above, and Arrow's for a damaged file
        raise _unreadable(url, error) from None


def _unreadable(url: str, error: Exception) -> BridgekitError:
    remedy = "check the name, and that every machine may read it"
    if isinstance(error, ImportError):
        remedy = "install the package that fsspec needs for this kind of URL, on every machine"
    return BridgekitError(f"it cannot be read ({one_line(error)[:300]})", where=url, remedy=remedy)


def _no_shard(url: str, error: Exception) -> BridgekitError:
    return BridgekitError(
        f"this is not an uncompressed tar file ({one_line(error)})", where=url, remedy="unpack .tar.gz with gunzip"
    )
