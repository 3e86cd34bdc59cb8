"""Search that grows: embeddings in LanceDB, a table for each modality, in a folder or in object storage by URL.

    bridgekit index photos --bridge bridges/image-text
    bridgekit search "a red door" --index bridges/image-text.index

A table for each modality, rather than one for all: modalities lie apart in the shared space, so partitions of all of them
together would hold, around a text, nothing but texts.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.filters import check_filter, unusable_filter
from bridgekit.hardware import threads
from bridgekit.latents.encode import encode_items
from bridgekit.media import content_hash
from bridgekit.pairs import SetAside
from bridgekit.progress import Report, silent
from bridgekit.storage.bounded import parse_json
from bridgekit.tables.listing import Listing

if TYPE_CHECKING:
    from lancedb.db import DBConnection
    from lancedb.table import Table

FORMAT = "1"
#: From so many rows on, a table gets an approximate index, and so many candidates are not compared one by one.
APPROXIMATE_FROM = 100_000
#: Its kind, how many partitions a search looks into, and how many times k it compares exactly. benchmarks/index.py measures
#: this choice beside others.
KIND, PROBES, REFINE = "IVF_SQ", 20, 10
#: An index that has grown to so many times the rows that it was built on is built again.
GROWN = 2
#: Stored vectors by which recall is measured.
RECALL_QUERIES = 300
#: Embeddings wait so long for others to be added with.
COMMIT_SECONDS = 3.0
#: Items that are encoded at a time. Blocks are the same in every run, and added whole: so a run that was killed meets the
#: same batches when it goes on, and its vectors are the same to the last bit.
BLOCK = {TEXT: 4_096}
FILE_BLOCK = 256
#: What older versions held is removed after this time: searches that began before a change end undisturbed.
CLEAN_AFTER = timedelta(minutes=10)

#: Columns of every table; all others are those of the tables that were indexed.
OWN = ("content", "item", "source", "vector")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,14})(?:\.\d{1,15})?(?:[eE][-+]?\d{1,2})?")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://")
_RECORD = b"bridgekit.approximate"

Cell = str | int | float | None


@dataclass(frozen=True)
class Added:
    """What adding a listing did.

    Arguments:
        modality: of the items.
        new: rows added.
        changed: rows whose item has moved, or of which the table says something else now.
        unchanged: rows that were there.
        gone: rows of the same source that are no longer in it, and that stay.
        removed: such rows that were removed: all if asked to prune, else those whose file now holds something else.
        set_aside: items that cannot be used.
        seconds: how long it took.
    """

    modality: str
    new: int
    changed: int
    unchanged: int
    gone: int
    removed: int
    set_aside: Sequence[SetAside]
    seconds: float


@dataclass(frozen=True)
class Approximate:
    """An approximate index, and how good it was found to be when it was built.

    Arguments:
        kind: as LanceDB names it.
        rows: how many it was built on.
        recall: modality of the queries to recall@10 against exact search, by stored vectors of that modality as queries.
    """

    kind: str
    rows: int
    recall: Mapping[str, float]


@dataclass(frozen=True)
class IndexHit:
    """One search result: a path or text, its cosine similarity, and what its row of the indexed table says."""

    item: str
    similarity: float
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Arguments:
        hits: for each query its hits, best first.
        candidates: how many rows were searched: all of the modality that pass the filter.
        approximate: the index that was used, or None where every candidate was compared.
    """

    hits: Sequence[Sequence[IndexHit]]
    candidates: int
    approximate: Approximate | None


@dataclass(frozen=True)
class Index:
    """Embeddings of one bridge's items, to be searched and added to. Made by `open` and `create`.

    Arguments:
        path: a folder, or the URL of one in object storage (s3://, gs://, az://), which LanceDB opens with the credentials
            that it finds in the environment.
        bridge_path: where the bridge was when the index was begun, if that is known.

    Any number of processes may search it while others add to it.
    """

    path: str
    bridge_path: str | None
    _database: DBConnection = field(repr=False, compare=False)
    _tables: dict[str, Table] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """Open an index that is there.

        Raises:
            BridgekitError: there is none, it is damaged, or it is not one of bridgekit's.
        """
        if not _URL.match(str(path)) and not any(Path(path).glob("*.lance")):
            raise BridgekitError(
                "there is no index here" if Path(path).exists() else "there is no such folder",
                where=str(path),
                remedy="make one: bridgekit index ITEMS --bridge BRIDGE --out FOLDER",
            )
        return cls._connect(path)

    @classmethod
    def create(cls, path: str | Path, bridge_path: str | Path | None = None) -> Index:
        """Open an index, or begin one where there is none.

        Arguments:
            path: a folder or URL.
            bridge_path: the bridge's folder. A new index keeps it, so that a search need not name it.

        Raises:
            BridgekitError: something else is there, or the place cannot be written.
        """
        if not _URL.match(str(path)) and Path(path).exists():
            folder = Path(path)
            if not folder.is_dir() or any(entry.suffix != ".lance" for entry in folder.iterdir()):
                raise BridgekitError(
                    "this place holds something that is not an index", where=str(path), remedy="choose another --out"
                )
        return cls._connect(path, bridge_path)

    @classmethod
    def _connect(cls, path: str | Path, bridge_path: str | Path | None = None) -> Index:
        lancedb = _lancedb()
        place = str(path) if _URL.match(str(path)) else str(Path(path).absolute())
        with _told(place):
            # Every read asks for the newest version: one process sees what another has added.
            database = lancedb.connect(place, read_consistency_interval=timedelta(0))
            names = _table_names(database)
        tables: dict[str, Table] = {}
        found = None if bridge_path is None else str(Path(bridge_path).absolute())
        for name in names:
            with _told(place):
                table = database.open_table(name)
            facts = _checked(table, place)
            tables[facts["modality"]] = table
            found = facts.get("bridge") or found
        return cls(place, found, database, tables)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that it has a table of."""
        return tuple(self._tables)

    def rows(self, modality: str) -> int:
        """How many items of a modality there are."""
        with _told(self.path):
            return self._table(modality).count_rows()

    def columns(self, modality: str) -> dict[str, str]:
        """The columns that a filter may name, and what they hold: text or numbers."""
        schema = self._table(modality).schema
        return {name: _holds(schema.field(name)) for name in schema.names if name != "vector"}

    def approximate(self, modality: str) -> Approximate | None:
        """The approximate index of a modality's table, or None while it has none."""
        metadata = self._table(modality).schema.field("vector").metadata or {}
        if _RECORD not in metadata:
            return None
        try:
            record = parse_json(metadata[_RECORD], limit=1 << 16)
            recall = {str(query): float(value) for query, value in record["recall"].items()}
            return Approximate(str(record["kind"]), int(record["rows"]), recall)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(self.path, f"its record of the approximate index cannot be read: {error}") from None

    def check(self, bridge: Bridge) -> None:
        """Raise BridgekitError unless the bridge embeds into the space of this index.

        A bridge to which a modality was bound later does: its older adapters are the same.
        """
        common = [modality for modality in self._tables if modality in bridge.sides]
        for modality in common:
            facts = _facts(self._tables[modality])
            if (facts.get("revision"), facts.get("adapter")) != _identity(bridge, modality):
                raise self._foreign(f"its {modality} vectors are not those of this bridge")
        if self._tables and not common:
            raise self._foreign(f"it holds {', '.join(self._tables)}, and this bridge has {', '.join(bridge.sides)}")

    def _foreign(self, why: str) -> BridgekitError:
        own = f" ({self.bridge_path})" if self.bridge_path else ""
        return BridgekitError(
            f"the index was made with another bridge: {why}",
            where=self.path,
            remedy=f"name its own with --bridge{own}, or index anew with this one into another --out",
        )

    def _table(self, modality: str) -> Table:
        if modality not in self._tables:
            held = ", ".join(self._tables) or "nothing yet"
            raise BridgekitError(f"the index has no {modality}", where=self.path, remedy=f"it holds {held}")
        return self._tables[modality]

    # ---- adding

    def add(
        self, bridge: Bridge, listing: Listing, *, prune: bool = False, strict: bool = False, report: Report = silent
    ) -> Added:
        """Embed the items that are not there yet, and add them: every few seconds, so that a run that is killed goes on.

        An item is known by its content, whatever its name: one that has moved is not embedded again, and two files that hold
        the same are one row. A row belongs to the source that named it last.

        Arguments:
            bridge: the one that the index was begun with.
            listing: the items, with what is to be kept beside each.
            prune: remove the rows of the same source that are no longer in it.
            strict: whether an item that cannot be used is fatal.
            report: told how it goes on.

        Raises:
            BridgekitError: the bridge is another, a column holds something else than in the index, or strict.
        """
        started = time.monotonic()
        self.check(bridge)
        bridge.side(listing.modality)
        positions, reasons = _contents(listing)
        if strict:
            _refuse(listing, reasons)
        table = self._table_for(bridge, listing)
        rows = _Rows(listing, table.schema)
        with _told(self.path):
            same, changed, gone = rows.compare(table, positions)
        counts = {"new": 0, "changed": 0}
        waiting: list[Any] = []
        committed = time.monotonic()

        def commit() -> None:
            nonlocal committed
            pending, committed = waiting[:], time.monotonic()
            waiting.clear()
            if pending:
                with _told(self.path):
                    _merge(table, pending, update=bool(changed))

        keys = [key for key in positions if key not in same]
        size = BLOCK.get(listing.modality, FILE_BLOCK)
        block_of = {key: number // size for number, key in enumerate(positions)}
        done = 0
        try:
            for block in _runs(keys, block_of):
                vectors, failed = self._embed(bridge, listing, [positions[key] for key in block], done, len(keys), report)
                reasons |= {positions[block[at]]: reason for at, reason in failed.items()}
                if strict:
                    _refuse(listing, reasons)
                kept = [key for at, key in enumerate(block) if at not in failed]
                if kept:
                    waiting.append(rows.arrow(kept, [positions[key] for key in kept], vectors))
                    counts["changed"] += sum(key in changed for key in kept)
                    counts["new"] += sum(key not in changed for key in kept)
                if time.monotonic() - committed >= COMMIT_SECONDS:
                    commit()
                done += len(block)
                report(f"indexing {listing.modality}", done, len(keys))
        finally:
            commit()
        listed = {item for position, item in enumerate(rows.values["item"]) if position not in reasons}
        # A file that was written anew answers by what it holds now, not by what it held.
        removed = [key for key, item in gone.items() if prune or item in listed]
        with _told(self.path):
            for start in range(0, len(removed), 500):
                table.delete(f"content IN ({', '.join(repr(key) for key in removed[start : start + 500])})")
        return Added(
            listing.modality,
            counts["new"],
            counts["changed"],
            len(same),
            len(gone) - len(removed),
            len(removed),
            _set_aside(listing, reasons),
            time.monotonic() - started,
        )

    def _embed(
        self, bridge: Bridge, listing: Listing, positions: Sequence[int], done: int, total: int, report: Report
    ) -> tuple[Tensor, Mapping[int, str]]:
        """Vectors of the items at these positions, without those that fail, and the reasons of the latter."""
        latents = encode_items(
            bridge.encoder(listing.modality),
            [listing.items[position] for position in positions],
            progress=lambda some, _: report(f"indexing {listing.modality}", done + some, total),
        )
        matrix = latents.matrix[torch.from_numpy(latents.ids[latents.ids >= 0])]
        return bridge.project(listing.modality, matrix).cpu(), latents.failed

    def _table_for(self, bridge: Bridge, listing: Listing) -> Table:
        """The modality's table, begun where there is none, with a column for each of the listing's."""
        import pyarrow as pa

        modality = listing.modality
        wanted = _fields(listing)
        if modality not in self._tables:
            revision, adapter = _identity(bridge, modality)
            facts = {"bridgekit": FORMAT, "modality": modality, "encoder": bridge.sides[modality].encoder}
            facts |= {"revision": revision, "adapter": adapter, "bridge": self.bridge_path or ""}
            # By its key LanceDB tells that two processes add the same row at once; without it, both would be kept.
            key = pa.field("content", pa.string(), False, {"lance-schema:unenforced-primary-key:position": "1"})
            own = [
                key,
                pa.field("item", pa.string(), False),
                pa.field("source", pa.string(), False),
                pa.field("vector", pa.list_(pa.float32(), bridge.dim), False),
            ]
            with _told(self.path):
                table = self._database.create_table(
                    _table_name(modality), schema=pa.schema([*own, *wanted], metadata=facts), exist_ok=True
                )
            _checked(table, self.path)
            self._tables[modality] = table
            self.check(bridge)  # another process may have been quicker, with another bridge
        table = self._tables[modality]
        schema = table.schema
        for column in wanted:
            here = column.name in schema.names and _holds(schema.field(column.name))
            if here == "numbers" and _holds(column) == "text":
                raise BridgekitError(
                    f"the column `{column.name}` holds numbers in the index, and texts here",
                    where=listing.source,
                    remedy="rename the column, or index into another --out",
                )
        missing = [column for column in wanted if column.name not in schema.names]
        if missing:
            with _told(self.path):
                table.add_columns(pa.schema(missing))
        return table

    def finish(self, report: Report = silent) -> None:
        """Merge small pieces, build approximate indexes where tables have grown large, and measure their recall.

        Call it when all has been added. Until then searches are exact, or compare what is new exactly.
        """
        for modality, table in self._tables.items():
            rows, built = self.rows(modality), self.approximate(modality)
            with _told(self.path):
                if rows >= APPROXIMATE_FROM and (built is None or rows >= GROWN * built.rows):
                    report(f"building an index of {modality}", 0, rows)
                    _build(table)
                    _record(table, Approximate(KIND, rows, {}))
                    report(f"building an index of {modality}", rows, rows)
                table.optimize(cleanup_older_than=CLEAN_AFTER)
        for modality, table in self._tables.items():
            built = self.approximate(modality)
            if built is not None and set(built.recall) != set(self._tables):
                recall = {query: self._recall(modality, query) for query in self._tables}
                with _told(self.path):
                    _record(table, Approximate(built.kind, built.rows, recall))

    def _recall(self, modality: str, query: str) -> float:
        """recall@10 of a table's approximate index against exact search, by a sample of stored vectors as queries.

        A query's own row is left out. A hit counts if it is no less similar than the tenth of the exact ones.
        """
        k = 10
        with _told(self.path):
            asked = self._table(query)
            count = asked.count_rows()
            chosen = np.random.default_rng(0).choice(count, min(RECALL_QUERIES, count), replace=False)
            sample = asked.take_offsets(sorted(chosen.tolist())).select(["content", "vector"]).to_arrow()
            queries, own = _matrix(sample["vector"].combine_chunks()), sample["content"].to_pylist()
            best = torch.full((len(queries), k), -torch.inf)
            for batch in self._table(modality).search().select(["content", "vector"]).to_batches(8_192):
                scores = queries @ _matrix(batch["vector"]).T
                if query == modality:
                    at = {key: column for column, key in enumerate(batch["content"].to_pylist())}
                    for row, key in enumerate(own):
                        if key in at:
                            scores[row, at[key]] = -torch.inf
                best = torch.cat([best, scores], 1).topk(k, dim=1).values
        hits = self.search(queries, modality, k + 1).hits
        found = 0
        for row, (key, listed) in enumerate(zip(own, hits, strict=True)):
            others = [hit for hit in listed if query != modality or hit.cells["content"] != key][:k]
            found += sum(hit.similarity >= float(best[row, -1]) - 1e-5 for hit in others)
        return found / (k * len(queries))

    # ---- searching

    def search(self, vectors: Tensor, to: str, k: int = 10, *, where: str | None = None, exact: bool = False) -> Found:
        """The k rows of one modality that are nearest to each vector.

        Arguments:
            vectors: (n, dim) float32 at unit length, of any modality of the same bridge.
            to: the modality to search.
            k: how many hits a query.
            where: a filter on the columns, for example "split = 'test' and year >= 1990": see `bridgekit.filters`.
            exact: compare every candidate, however many there are.

        Raises:
            BridgekitError: the index has nothing of that modality, or the filter cannot be used.
        """
        table, columns = self._table(to), self.columns(to)
        sql = None if where is None else check_filter(where, columns)
        try:
            with _told(self.path):
                candidates = table.count_rows(sql)
        except BridgekitError as error:
            if where is None:
                raise
            raise unusable_filter(where, columns, error.what.removeprefix(_UNUSABLE)) from None
        built = None if exact or candidates < APPROXIMATE_FROM else self.approximate(to)
        hits: list[list[IndexHit]] = [[] for _ in range(len(vectors))]
        if not candidates:
            return Found(hits, 0, None)
        with _told(self.path):
            query = table.search(vectors.detach().cpu().numpy(), vector_column_name="vector", query_type="vector")
            query = query.distance_type("cosine").limit(k).select([*columns, "_distance"])  # type: ignore[attr-defined]
            if sql is not None:
                query = query.where(sql, prefilter=True)
            query = query.nprobes(PROBES).refine_factor(REFINE) if built else query.bypass_vector_index()
            rows = query.to_arrow().to_pylist()
        for row in rows:
            item, distance, number = row.pop("item"), row.pop("_distance"), row.pop("query_index", 0)
            cells = {name: int(cell) if isinstance(cell, float) and cell.is_integer() else cell for name, cell in row.items()}
            hits[number].append(IndexHit(item, 1 - distance, cells))
        for listed in hits:
            listed.sort(key=lambda hit: -hit.similarity)
        return Found(hits, candidates, built)

    def find(
        self,
        bridge: Bridge,
        modality: str,
        queries: Sequence[Item] | Item,
        to: str,
        k: int = 10,
        *,
        where: str | None = None,
        exact: bool = False,
        report: Report = silent,
    ) -> Found:
        """`search` by items: only the encoder of their own modality is opened.

        Raises:
            ItemError: a query cannot be used.
            BridgekitError: as for `check` and `search`.
        """
        self.check(bridge)
        self._table(to)
        if where is not None:
            check_filter(where, self.columns(to))  # before an encoder is opened
        return self.search(bridge.embed(modality, queries, report=report), to, k, where=where, exact=exact)


class _Rows:
    """A listing as the rows of a table: all but their vectors.

    Arguments:
        listing: n items.
        schema: the table's. Columns that the listing lacks are empty.
    """

    def __init__(self, listing: Listing, schema: Any) -> None:
        self.schema = schema
        cells = _columns(listing)
        self.values: dict[str, list[Cell]] = {}
        for name in schema.names:
            if name == "item":
                self.values[name] = [str(item) for item in listing.items]
            elif name == "source":
                self.values[name] = [listing.source] * len(listing)
            elif name not in OWN and name in cells:
                number = _holds(schema.field(name)) == "numbers"
                self.values[name] = [(float(cell) if number else cell) if cell else None for cell in cells[name]]
            elif name not in OWN:
                self.values[name] = [None] * len(listing)
        self.source = listing.source

    def compare(self, table: Table, positions: Mapping[str, int]) -> tuple[set[str], set[str], dict[str, str]]:
        """Keys of the rows that the table has just so, of those that it has otherwise, and of those gone, with their items."""
        same: set[str] = set()
        changed: set[str] = set()
        gone: dict[str, str] = {}
        names = list(self.values)
        item, source = names.index("item"), names.index("source")
        for batch in table.search().select(["content", *names]).to_batches(8_192):
            stored = zip(*(batch[name].to_pylist() for name in names), strict=True)
            for key, row in zip(batch["content"].to_pylist(), stored, strict=True):
                if key in positions:
                    wanted = tuple(self.values[name][positions[key]] for name in names)
                    (same if row == wanted else changed).add(key)
                elif row[source] == self.source:
                    gone[key] = str(row[item])
        return same, changed, gone

    def arrow(self, keys: Sequence[str], positions: Sequence[int], vectors: Tensor) -> Any:
        """An Arrow table of these rows, with vectors (len(keys), dim)."""
        import pyarrow as pa

        columns: dict[str, Any] = {name: [cells[at] for at in positions] for name, cells in self.values.items()}
        columns["content"] = keys
        flat = pa.array(vectors.contiguous().numpy().ravel())
        columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        arrays = [pa.array(columns[field.name], field.type) for field in self.schema if field.name != "vector"]
        arrays.insert(self.schema.get_field_index("vector"), columns["vector"])
        return pa.Table.from_arrays(arrays, schema=self.schema)


def _lancedb() -> Any:
    # Its log would mix warnings for its own developers into what is printed here.
    os.environ.setdefault("LANCEDB_LOG", "error")
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")
    try:
        import lancedb
    except ImportError:
        raise BridgekitError("LanceDB is not installed", remedy="in bridgekit's own folder: pip install '.[index]'") from None
    return lancedb


_UNUSABLE = "the index cannot be used: "


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Turn what LanceDB raises into one message. Its panics on damaged files are no `Exception`s."""
    try:
        yield
    except BridgekitError:
        raise
    except BaseException as error:
        if not isinstance(error, OSError | ValueError | RuntimeError | TypeError) and type(error).__name__ != "PanicException":
            raise
        reason = re.split(r"\n|, /root/|, /home/|, /github/|, rust/", str(error))[0][:300]
        remedy = "check the place; if the index is damaged, remove it and make it again: latents are kept, so it takes little"
        raise BridgekitError(f"{_UNUSABLE}{reason}", where=place, remedy=remedy) from error


def _damaged(place: str, why: str) -> BridgekitError:
    return BridgekitError(f"this index is damaged, or not one of bridgekit's: {why}", where=place, remedy="make it again")


def _table_names(database: DBConnection) -> list[str]:
    names: list[str] = []
    token: str | None = None
    while True:
        page = database.list_tables(page_token=token)
        names += page.tables
        token = page.page_token
        if not token:
            return names


def _table_name(modality: str) -> str:
    """The modality, or, where LanceDB does not take it for a table's name, a hash of it."""
    return modality if re.fullmatch(r"\w[\w-]*", modality, re.ASCII) else f"m-{sha256(modality.encode()).hexdigest()[:16]}"


def _facts(table: Table) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}


def _checked(table: Table, place: str) -> dict[str, str]:
    """What a table says of itself. An index may come from anyone: nothing in it but texts, numbers and vectors is taken.

    Raises:
        BridgekitError: it is another program's, has a newer format, or holds what no index of bridgekit's does.
    """
    import pyarrow as pa

    try:
        facts = _facts(table)
    except UnicodeDecodeError:
        raise _damaged(place, "its metadata is no text") from None
    if facts.get("bridgekit") not in (None, FORMAT):
        remedy = "install a newer bridgekit, from where this one came"
        raise BridgekitError(
            f"this index has format {facts['bridgekit']}, and format {FORMAT} is read", where=place, remedy=remedy
        )
    if not {"bridgekit", "modality", "revision", "adapter"} <= facts.keys():
        raise _damaged(place, "its tables do not say what is in them")
    # LanceDB would make the models that such an entry names, with the arguments that it gives.
    if "embedding_functions" in facts:
        raise _damaged(place, "it names models to run")
    types: dict[str, Any] = {field.name: field.type for field in table.schema}
    vector: Any = types.get("vector")
    if not pa.types.is_fixed_size_list(vector) or vector.value_type != pa.float32():
        raise _damaged(place, "it has no column of vectors")
    plain = all(kind in (pa.string(), pa.float64()) for name, kind in types.items() if name != "vector")
    if not plain or not set(OWN) <= types.keys():
        raise _damaged(place, "it has columns that are neither texts nor numbers, or lacks some")
    return facts


def _identity(bridge: Bridge, modality: str) -> tuple[str, str]:
    """What must be equal for vectors to be of one space: the encoder's revision, and the adapter bit for bit."""
    return bridge.side(modality).revision, bridge.weights_hash([modality])


def _holds(column: Any) -> str:
    return "numbers" if str(column.type) == "double" else "text"


def _columns(listing: Listing) -> dict[str, Sequence[str]]:
    """The listing's columns that hold anything, under names that a table can have and that are not its own."""
    columns: dict[str, Sequence[str]] = {}
    for name, cells in listing.cells.items():
        clean = re.sub(r"[.`\x00-\x1f]", "_", name)
        if clean.lower() in OWN or clean.startswith("_"):
            clean = clean.strip("_") + "_"
        if any(cells):
            columns.setdefault(clean, cells)
    return columns


def _fields(listing: Listing) -> list[Any]:
    import pyarrow as pa

    return [
        pa.field(name, pa.float64() if all(_NUMBER.fullmatch(cell) for cell in cells if cell) else pa.string())
        for name, cells in _columns(listing).items()
    ]


def _contents(listing: Listing) -> tuple[dict[str, int], dict[int, str]]:
    """Hashes of what the items hold, each with the position of the first such item, and the reasons of those unreadable."""

    def one(item: Item) -> str | ItemError:
        try:
            str(item).encode()
            return content_hash(item).hex()
        except UnicodeEncodeError:
            return ItemError("its name is not in UTF-8", remedy="rename it")
        except ItemError as error:
            return error

    with ThreadPoolExecutor(threads()) as pool:
        results = list(pool.map(one, listing.items, chunksize=64))
    positions: dict[str, int] = {}
    for position, result in enumerate(results):
        if isinstance(result, str):
            positions.setdefault(result, position)
    return positions, {position: result.reason for position, result in enumerate(results) if isinstance(result, ItemError)}


def _runs(keys: Sequence[str], block_of: Mapping[str, int]) -> Iterator[list[str]]:
    """The keys, a block at a time."""
    for _, block in groupby(keys, block_of.__getitem__):
        yield list(block)


def _set_aside(listing: Listing, reasons: Mapping[int, str]) -> list[SetAside]:
    """All rows that cannot be used: those found while reading, and those of these positions."""
    found = (
        SetAside(listing.row(position), listing.modality, str(listing.items[position])[:200], reason)
        for position, reason in sorted(reasons.items())
    )
    return [*listing.set_aside, *found]


def _refuse(listing: Listing, reasons: Mapping[int, str]) -> None:
    """Raise BridgekitError if there is anything to set aside."""
    set_aside = _set_aside(listing, reasons)
    if set_aside:
        first = set_aside[0]
        raise BridgekitError(
            f"{len(set_aside)} of {len(listing) + len(listing.set_aside)} items cannot be used: {first.reason}",
            where=f"{listing.source}, row {first.row}: {first.item}",
            remedy="mend or remove them, or leave out --strict to have them set aside",
        )


def _merge(table: Table, pieces: Sequence[Any], *, update: bool) -> None:
    import pyarrow as pa

    merge = table.merge_insert("content")
    if update:
        merge = merge.when_matched_update_all()
    merge.when_not_matched_insert_all().execute(pa.concat_tables(pieces))


def _matrix(vectors: Any) -> Tensor:
    """An Arrow array of n vectors as an (n, dim) tensor."""
    return torch.from_numpy(vectors.flatten().to_numpy(zero_copy_only=False).copy()).view(len(vectors), -1)


def _build(table: Table) -> None:
    from lancedb.index import IvfSq

    table.create_index("vector", config=IvfSq(distance_type="cosine"))


def _record(table: Table, built: Approximate) -> None:
    """Keep it with the column of vectors: so it goes wherever the table goes."""
    table.update_field_metadata({"path": "vector", "metadata": {_RECORD.decode(): json.dumps(asdict(built))}})
