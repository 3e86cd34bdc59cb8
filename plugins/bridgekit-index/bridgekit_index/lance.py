"""LanceDB's side of an index: tables, what they say of themselves, errors. Nothing that is read from a table is trusted."""

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

from bridgekit.errors import BridgekitError
from bridgekit.hookspecs import Approximate
from bridgekit.storage.bounded import parse_json

if TYPE_CHECKING:
    from lancedb.db import DBConnection
    from lancedb.table import Table

FORMAT = "1"
#: Columns of every table; all others are those of the tables that were indexed.
OWN = ("content", "item", "source", "vector")
UNUSABLE = "the index cannot be used: "
_RECORD = b"bridgekit.approximate"


def connect(place: str) -> DBConnection:
    """Open a database at a path or URL."""
    # LanceDB's log would mix warnings for its own developers into what is printed here.
    os.environ.setdefault("LANCEDB_LOG", "error")
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")
    import lancedb

    # Every read asks for the newest version: one process sees what another has added.
    return lancedb.connect(place, read_consistency_interval=timedelta(0))


@contextmanager
def clear_errors(place: str) -> Iterator[None]:
    """Turn what LanceDB raises into one message. Its panics on damaged files are not instances of `Exception`."""
    try:
        yield
    except BridgekitError:
        raise
    except BaseException as error:
        if not isinstance(error, OSError | ValueError | RuntimeError | TypeError) and type(error).__name__ != "PanicException":
            raise
        reason = re.split(r"\n|, /root/|, /home/|, /github/|, rust/", str(error))[0][:300]
        remedy = "check the path; if the index is damaged, delete it and make it again (latents are cached, so that is quick)"
        raise BridgekitError(f"{UNUSABLE}{reason}", where=place, remedy=remedy) from error


def damaged(place: str, why: str) -> BridgekitError:
    """The error for a table that bridgekit did not write, or that somebody changed."""
    return BridgekitError(f"this index is damaged, or not one of bridgekit's: {why}", where=place, remedy="make it again")


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
    """The modality, or a hash of it where LanceDB does not accept it as the name of a table."""
    return modality if re.fullmatch(r"\w[\w-]*", modality, re.ASCII) else f"m-{sha256(modality.encode()).hexdigest()[:16]}"


def empty_schema(metadata: Mapping[str, str], dim: int, columns: Sequence[pa.Field]) -> pa.Schema:
    """The schema of a new table: bridgekit's own columns and those of the indexed table."""
    # By its key LanceDB notices that two processes add the same row at once; without it, both would be kept.
    key = pa.field("content", pa.string(), False, {"lance-schema:unenforced-primary-key:position": "1"})
    item, source = (pa.field(name, pa.string(), False) for name in ("item", "source"))
    vector = pa.field("vector", pa.list_(pa.float32(), dim), False)
    return pa.schema([key, item, source, vector, *columns], metadata=metadata)


def read_metadata(table: Table) -> dict[str, str]:
    """What a table says of itself, unchecked."""
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}


def checked_metadata(table: Table, place: str) -> dict[str, str]:
    """What a table says of itself. An index may come from anyone: only texts, numbers and vectors are accepted in it.

    Raises:
        BridgekitError: it is another program's, has a newer format, or holds what no index of bridgekit's does.
    """
    try:
        metadata = read_metadata(table)
    except UnicodeDecodeError:
        raise damaged(place, "its metadata is not text") from None
    if metadata.get("bridgekit") not in (None, FORMAT):
        remedy = "install a newer bridgekit, from where this one came"
        raise BridgekitError(
            f"this index has format {metadata['bridgekit']}, and format {FORMAT} is read", where=place, remedy=remedy
        )
    if not {"bridgekit", "modality", "revision", "adapter"} <= metadata.keys():
        raise damaged(place, "its tables do not say what is in them")
    # LanceDB would build the models that such an entry names, with the arguments that it gives.
    if "embedding_functions" in metadata:
        raise damaged(place, "it names models to run")
    types: dict[str, Any] = {field.name: field.type for field in table.schema}
    vector: Any = types.get("vector")
    if not pa.types.is_fixed_size_list(vector) or vector.value_type != pa.float32():
        raise damaged(place, "it has no column of vectors")
    plain = all(kind in (pa.string(), pa.float64()) for name, kind in types.items() if name != "vector")
    if not plain or not set(OWN) <= types.keys():
        raise damaged(place, "it has columns that are neither texts nor numbers, or lacks some")
    return metadata


def holds(column: pa.Field) -> str:
    """What is in a column: `text` or `numbers`."""
    return "numbers" if str(column.type) == "double" else "text"


def merge(table: Table, pieces: Sequence[pa.Table], *, update: bool) -> None:
    """Add rows; with `update`, rows that are there under the same key are replaced."""
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
    """Record with the column of vectors how its approximate index was built: so the record goes wherever the table goes."""
    table.update_field_metadata({"path": "vector", "metadata": {_RECORD.decode(): json.dumps(asdict(built))}})


def read_approximate(table: Table, place: str) -> Approximate | None:
    """The record of a table's approximate index, or None while it has none."""
    metadata = table.schema.field("vector").metadata or {}
    if _RECORD not in metadata:
        return None
    try:
        record = parse_json(metadata[_RECORD], limit=1 << 16)
        recall = {str(query): float(value) for query, value in record["recall"].items()}
        return Approximate(str(record["kind"]), int(record["rows"]), recall)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(place, f"its record of the approximate index cannot be read: {error}") from None
