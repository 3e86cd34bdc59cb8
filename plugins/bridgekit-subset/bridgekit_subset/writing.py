"""Writing tables of pairs."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bridgekit.encoders import Item
from bridgekit.errors import BridgekitError
from bridgekit.items import Blob
from bridgekit.pairs import Pairs
from bridgekit.storage.cache import write_atomically

#: What tables are written as.
WRITTEN = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


def write_pairs(pairs: Pairs, path: Path) -> None:
    """Write a table for `read_pairs`: one column per modality, and `split` and `group` if present.

    Arguments:
        pairs: the table.
        path: ends in .csv, .tsv, .jsonl, .ndjson or .parquet. An existing file is replaced.

    Raises:
        BridgekitError: the extension is not supported, or the file cannot be written.
    """
    check_place(path, pairs.source)
    folder = path.parent.absolute()
    columns: dict[str, Sequence[str | bytes | None]] = {
        modality: [_cell(item, folder) for item in items] for modality, items in pairs.columns.items()
    }
    for name, cells in (("split", pairs.split), ("group", pairs.group)):
        if cells is not None:
            columns[name] = [cell or None for cell in cells]
    if path.suffix.lower() != ".parquet" and any(isinstance(cell, bytes) for cells in columns.values() for cell in cells):
        raise BridgekitError(
            "the table's files are inside it, and only Parquet can hold files", where=str(path), remedy="use .parquet for --out"
        )
    write_atomically(path, lambda aside: _write(columns, path.suffix.lower(), aside))


def _write(columns: Mapping[str, Sequence[str | bytes | None]], suffix: str, path: Path) -> None:
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({name: pa.array(cells) for name, cells in columns.items()}), path)
        return
    rows = zip(*columns.values(), strict=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if suffix in (".csv", ".tsv"):
            writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t")
            writer.writerow(columns)
            writer.writerows(rows)
        else:
            for row in rows:
                there = {name: cell for name, cell in zip(columns, row, strict=True) if cell is not None}
                file.write(json.dumps(there, ensure_ascii=False) + "\n")


def _cell(item: Item | None, folder: Path) -> str | bytes | None:
    """An item as a cell of a table in this folder: paths inside it are relative, and items without a file are their bytes."""
    if not isinstance(item, Path):
        return item.read() if isinstance(item, Blob) else item
    path = item.absolute()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def check_place(path: Path, source: object) -> None:
    """Raise BridgekitError if a table cannot be written to this path, or would overwrite its own source."""
    if path.suffix.lower() not in WRITTEN:
        raise BridgekitError(
            f"cannot write a table as {path.suffix or 'a file without an extension'}",
            where=str(path),
            remedy=f"use {', '.join(WRITTEN)}",
        )
    if isinstance(source, str | Path) and path.exists() and Path(source).exists() and path.samefile(source):
        raise BridgekitError("the output would overwrite the source table", where=str(path), remedy="give another --out")
