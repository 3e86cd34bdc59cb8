"""Access to LanceDB: tables, their metadata, errors. Nothing read from a table is trusted."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from bridgekit.encoders import is_modality
from bridgekit.errors import BridgekitError
from bridgekit.hookspecs import Approximate
from bridgekit.storage.bounded import parse_json

if TYPE_CHECKING:
    from lancedb.db import DBConnection
    from lancedb.table import Table

FORMAT = "1"
#: Columns of every table; the others come from the indexed tables.
OWN = ("content", "item", "source", "vector")
UNUSABLE = "the index cannot be used: "
_RECORD = b"bridgekit.approximate"


def connect(place: str) -> DBConnection:
    """Open a database at a path or URL."""
    # LanceDB logs warnings that do not concern users.
    os.environ.setdefault("LANCEDB_LOG", "error")
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")
    import lancedb

    # Read the latest version every time, to see what other processes have added.
    return lancedb.connect(place, read_consistency_interval=timedelta(0))


@contextmanager
def clear_errors(place: str) -> Iterator[None]:
    """Turn LanceDB's errors into BridgekitErrors. Its panics on damaged files are not instances of `Exception`."""
    try:
        yield
    except BridgekitError:
        raise
    except BaseException as error:
        if not isinstance(error, OSError | ValueError | RuntimeError | TypeError) and type(error).__name__ != "PanicException":
            raise
        reason = re.split(r"\n|, /root/|, /home/|, /github/|, rust/", str(error))[0][:300]
        remedy = "check the path; if the index is damaged, delete it and create it again (quick, because latents are cached)"
        raise BridgekitError(f"{UNUSABLE}{reason}", where=place, remedy=remedy) from error


def damaged(place: str, why: str) -> BridgekitError:
    """The error for a damaged table, or one not written by bridgekit."""
    return BridgekitError(f"the index is damaged or was not made by bridgekit: {why}", where=place, remedy="create it again")


def table_names(database: DBConnection) -> list[str]:
    """The names of all tables."""
    names: list[str] = []
    token: str | None = None
    while True:
        page = database.list_tables(page_token=token)
        names += page.tables
        token = page.page_token
        if not token:
            return names


def table_name(modality: str) -> str:
    """The modality, or its hash if LanceDB does not accept it as a table name."""
    return modality if re.fullmatch(r"\w[\w-]*", modality, re.ASCII) else f"m-{sha256(modality.encode()).hexdigest()[:16]}"


def empty_schema(metadata: Mapping[str, str], dim: int, columns: Sequence[pa.Field]) -> pa.Schema:
    """The schema of a new table: bridgekit's own columns and those of the indexed table."""
    # The key lets LanceDB detect two processes adding the same row; without it, both rows would be kept.
    key = pa.field("content", pa.string(), False, {"lance-schema:unenforced-primary-key:position": "1"})
    item, source = (pa.field(name, pa.string(), False) for name in ("item", "source"))
    vector = pa.field("vector", pa.list_(pa.float32(), dim), False)
    return pa.schema([key, item, source, vector, *columns], metadata=metadata)


def compact(table: Table, older_than: timedelta) -> None:
    """Merge a table's small files and delete old versions, unless another process is doing so at the same moment."""
    try:
        table.optimize(cleanup_older_than=older_than)
    except (OSError, RuntimeError, ValueError) as error:
        if "commit conflict" not in str(error):
            raise


def read_metadata(table: Table) -> dict[str, str]:
    """A table's metadata, unchecked."""
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}


def checked_metadata(table: Table, place: str) -> dict[str, str]:
    """A table's metadata. The table may come from anyone: only text, numbers and vectors are accepted.

    Raises:
        BridgekitError: it was not written by bridgekit, has a newer format, or contains anything else.
    """
    try:
        metadata = read_metadata(table)
    except UnicodeDecodeError:
        raise damaged(place, "its metadata is not text") from None
    if metadata.get("bridgekit") not in (None, FORMAT):
        what = f"the index has format {metadata['bridgekit']}; only format {FORMAT} is supported"
        raise BridgekitError(what, where=place, remedy="install a newer bridgekit")
    if not {"bridgekit", "modality", "revision", "adapter"} <= metadata.keys():
        raise damaged(place, "metadata is missing from its tables")
    if not is_modality(metadata["modality"]):
        raise damaged(place, f"{metadata['modality'][:60]!r} cannot be the name of a modality")
    # LanceDB would construct the models named there.
    if "embedding_functions" in metadata:
        raise damaged(place, "it names models to run")
    types: dict[str, Any] = {field.name: field.type for field in table.schema}
    vector: Any = types.get("vector")
    if not pa.types.is_fixed_size_list(vector) or vector.value_type != pa.float32():
        raise damaged(place, "it has no vector column")
    plain = all(kind in (pa.string(), pa.float64()) for name, kind in types.items() if name != "vector")
    if not plain or not set(OWN) <= types.keys():
        raise damaged(place, "columns are missing or are neither text nor numbers")
    return metadata


def holds(column: pa.Field) -> str:
    """A column's type: `text` or `numbers`."""
    return "numbers" if str(column.type) == "double" else "text"


def merge(table: Table, pieces: Sequence[pa.Table], *, update: bool) -> None:
    """Add rows; with `update`, replace rows with the same key."""
    insert = table.merge_insert("content")
    if update:
        insert = insert.when_matched_update_all()
    insert.when_not_matched_insert_all().execute(pa.concat_tables(pieces))


def matrix(vectors: Any) -> Tensor:
    """An Arrow array of n vectors as an (n, dim) tensor."""
    return torch.from_numpy(vectors.flatten().to_numpy(zero_copy_only=False).copy()).view(len(vectors), -1)


def build_approximate(table: Table) -> None:
    """Build the approximate index of a table."""
    from lancedb.index import IvfSq

    table.create_index("vector", config=IvfSq(distance_type="cosine"))


def write_approximate(table: Table, built: Approximate) -> None:
    """Store the record of the approximate index in the metadata of the vector column."""
    table.update_field_metadata({"path": "vector", "metadata": {_RECORD.decode(): json.dumps(asdict(built))}})


def read_approximate(table: Table, place: str) -> Approximate | None:
    """The record of a table's approximate index, or None."""
    metadata = table.schema.field("vector").metadata or {}
    if _RECORD not in metadata:
        return None
    try:
        record = parse_json(metadata[_RECORD], limit=1 << 16)
        recall = {str(query): float(value) for query, value in record["recall"].items()}
        return Approximate(str(record["kind"]), int(record["rows"]), recall)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(place, f"its record of the approximate index cannot be read: {error}") from None
