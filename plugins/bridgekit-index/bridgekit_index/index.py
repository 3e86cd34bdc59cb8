"""An index: embeddings in LanceDB, one table per modality, in a folder or in object storage.

    bridgekit index photos --bridge bridges/image-text
    bridgekit search "a red door" --index bridges/image-text.index

One table per modality because of the modality gap: in a common table, the partitions near a text would contain only texts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from bridgekit.bridge.bridge import Bridge
from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.hardware import threads
from bridgekit.hookspecs import Approximate, SearchResult
from bridgekit.latents.encode import encode_items
from bridgekit.media import content_hash
from bridgekit.pairs import SetAside
from bridgekit.progress import Report, silent
from bridgekit.retrieval import Hit
from bridgekit_index import lance
from bridgekit_index.filters import check_filter, unusable_filter
from bridgekit_index.lance import clear_errors, holds
from bridgekit_index.listing import Listing

if TYPE_CHECKING:
    from lancedb.db import DBConnection
    from lancedb.table import Table

#: Tables with at least this many rows get an approximate index. Searches with fewer candidates after filtering stay exact.
APPROXIMATE_FROM = 100_000
#: Kind of approximate index, probed partitions, and refine factor, chosen with benchmarks/index.py.
KIND, PROBES, REFINE = "IVF_SQ", 20, 10
#: The approximate index is rebuilt when the table has grown by this factor.
GROWN = 2
#: Of each query, this many times k rows are ordered by similarity less their penalty.
AHEAD = 5
#: Number of stored vectors used as queries to measure recall.
RECALL_QUERIES = 300
#: Seconds between writes.
COMMIT_SECONDS = 3.0
#: Items encoded at a time. Blocks are fixed and added whole, so a resumed run forms the same batches as an uninterrupted one,
#: and its vectors are bit-identical.
BLOCK = {TEXT: 4_096}
FILE_BLOCK = 256
#: Old versions of a table are kept this long, for searches that are still reading them.
CLEAN_AFTER = timedelta(minutes=10)

_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,14})(?:\.\d{1,15})?(?:[eE][-+]?\d{1,2})?")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://")


@dataclass(frozen=True)
class Added:
    """Result of `Index.add`.

    Arguments:
        modality: modality of the items.
        new: rows added.
        changed: rows whose item was moved or whose table cells changed.
        unchanged: rows already in the index.
        gone: rows kept although their source no longer has them.
        removed: rows removed: those whose file has new content and, with `prune`, those no longer in the source.
        set_aside: items that cannot be used.
        seconds: time taken.
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
class Index:
    """Embeddings of items in the space of one bridge. Use `open` or `create`.

    Arguments:
        path: a folder, or a URL in object storage (s3://, gs://, az://) with credentials in the environment.
        bridge_path: where the bridge was when the index was created, if known.

    Several processes can search it and add to it at the same time.
    """

    path: str
    bridge_path: str | None
    _database: DBConnection = field(repr=False, compare=False)
    _tables: dict[str, Table] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """Open an existing index.

        Raises:
            BridgekitError: it does not exist, is damaged, or was not written by bridgekit.
        """
        if not _is_url(path) and not any(Path(path).glob("*.lance")):
            raise BridgekitError(
                "there is no index here" if Path(path).exists() else "there is no such folder",
                where=str(path),
                remedy="create one: bridgekit index ITEMS --bridge BRIDGE --out FOLDER",
            )
        return cls._connect(path)

    @classmethod
    def create(cls, path: str | Path, bridge_path: str | Path | None = None) -> Index:
        """Open an index, or create it if it does not exist.

        Arguments:
            path: a folder or URL.
            bridge_path: the bridge folder, recorded in a new index so that searches find it.

        Raises:
            BridgekitError: the path contains something else or cannot be written.
        """
        if not _is_url(path) and Path(path).exists():
            folder = Path(path)
            if not folder.is_dir() or any(entry.suffix != ".lance" for entry in folder.iterdir()):
                raise BridgekitError("this path exists and is not an index", where=str(path), remedy="choose another --out")
        return cls._connect(path, bridge_path)

    @classmethod
    def _connect(cls, path: str | Path, bridge_path: str | Path | None = None) -> Index:
        place = str(path) if _is_url(path) else str(Path(path).absolute())
        with clear_errors(place):
            database = lance.connect(place)
            found = [database.open_table(name) for name in lance.table_names(database)]
        tables: dict[str, Table] = {}
        bridge = None if bridge_path is None else str(Path(bridge_path).absolute())
        for table in found:
            metadata = lance.checked_metadata(table, place)
            tables[metadata["modality"]] = table
            bridge = metadata.get("bridge") or bridge
        return cls(place, bridge, database, tables)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities in the index."""
        return tuple(self._tables)

    def rows(self, modality: str) -> int:
        """The number of items of a modality."""
        with clear_errors(self.path):
            return self._table(modality).count_rows()

    def columns(self, modality: str) -> dict[str, str]:
        """The columns usable in a filter, with their types: text or numbers."""
        schema = self._table(modality).schema
        return {name: holds(schema.field(name)) for name in schema.names if name != "vector"}

    def approximate(self, modality: str) -> Approximate | None:
        """A modality's approximate index, or None."""
        return lance.read_approximate(self._table(modality), self.path)

    def check(self, bridge: Bridge) -> None:
        """Raise BridgekitError unless the bridge embeds into the space of this index.

        Binding another modality to the bridge does not change that space.
        """
        common = [modality for modality in self._tables if modality in bridge.sides]
        for modality in common:
            metadata = lance.read_metadata(self._tables[modality])
            if (metadata.get("revision"), metadata.get("adapter")) != _identity(bridge, modality):
                raise self._foreign(f"its {modality} embeddings are not from this bridge")
        if self._tables and not common:
            raise self._foreign(f"the index has {', '.join(self._tables)}, this bridge has {', '.join(bridge.sides)}")

    def _foreign(self, why: str) -> BridgekitError:
        own = f" ({self.bridge_path})" if self.bridge_path else ""
        return BridgekitError(
            f"the index was made with another bridge: {why}",
            where=self.path,
            remedy=f"pass its own with --bridge{own}, or create another index for this one with --out",
        )

    def _table(self, modality: str) -> Table:
        if modality not in self._tables:
            held = ", ".join(self._tables) or "nothing yet"
            raise BridgekitError(f"the index has no {modality}", where=self.path, remedy=f"it contains {held}")
        return self._tables[modality]

    # ---- adding

    def add(
        self, bridge: Bridge, listing: Listing, *, prune: bool = False, strict: bool = False, report: Report = silent
    ) -> Added:
        """Embed and add the items that are not in the index. Rows are written every few seconds; a killed run can be resumed.

        Items are identified by content, not name: a moved file is not embedded again, and files with the same content share a
        row. A row belongs to the source that listed it last.

        Arguments:
            bridge: the bridge of this index.
            listing: the items with their metadata columns.
            prune: remove rows of the listing's source that are no longer in it.
            strict: fail if an item cannot be used.

        Raises:
            BridgekitError: the bridge is another one, a column has another type in the index, or an item is unusable and
                `strict` is set.
        """
        started = time.monotonic()
        self.check(bridge)
        bridge.side(listing.modality)
        positions, reasons = _contents(listing)
        if strict:
            _refuse(listing, reasons)
        table = self._table_for(bridge, listing)
        rows = _Rows(listing, table.schema)
        with clear_errors(self.path):
            same, changed, gone = rows.compare(table, positions)
        missing = [key for key in positions if key not in same]
        size = BLOCK.get(listing.modality, FILE_BLOCK)
        block_of = {key: number // size for number, key in enumerate(positions)}
        pending = _Pending(table, self.path, update=bool(changed))
        written: list[str] = []
        done = 0
        try:
            for _, group in groupby(missing, block_of.__getitem__):
                block = list(group)
                at = [positions[key] for key in block]
                vectors, failed = _embed(bridge, listing, at, done, len(missing), report)
                reasons |= {at[place]: reason for place, reason in failed.items()}
                if strict:
                    _refuse(listing, reasons)
                usable = [key for place, key in enumerate(block) if place not in failed]
                if usable:
                    pending.add(rows.arrow(usable, [positions[key] for key in usable], vectors))
                    written += usable
                done += len(block)
                report(f"indexing {listing.modality}", done, len(missing))
        finally:
            pending.write()
        listed = {item for position, item in enumerate(rows.values["item"]) if position not in reasons}
        # If a file has new content, remove the row of its old content.
        removed = [key for key, item in gone.items() if prune or item in listed]
        with clear_errors(self.path):
            for start in range(0, len(removed), 500):
                table.delete(f"content IN ({', '.join(repr(key) for key in removed[start : start + 500])})")
        again = sum(key in changed for key in written)
        return Added(
            listing.modality,
            new=len(written) - again,
            changed=again,
            unchanged=len(same),
            gone=len(gone) - len(removed),
            removed=len(removed),
            set_aside=_set_aside(listing, reasons),
            seconds=time.monotonic() - started,
        )

    def _table_for(self, bridge: Bridge, listing: Listing) -> Table:
        """The modality's table, created if necessary, with all columns of the listing."""
        modality = listing.modality
        wanted = _fields(listing)
        if modality not in self._tables:
            revision, adapter = _identity(bridge, modality)
            metadata = {"bridgekit": lance.FORMAT, "modality": modality, "encoder": bridge.sides[modality].encoder}
            metadata |= {"revision": revision, "adapter": adapter, "bridge": self.bridge_path or ""}
            with clear_errors(self.path):
                schema = lance.empty_schema(metadata, bridge.dim, wanted)
                table = self._database.create_table(lance.table_name(modality), schema=schema, exist_ok=True)
            lance.checked_metadata(table, self.path)
            self._tables[modality] = table
            self.check(bridge)  # another process may have created it first, with another bridge
        table = self._tables[modality]
        schema = table.schema
        for column in wanted:
            here = column.name in schema.names and holds(schema.field(column.name))
            if here == "numbers" and holds(column) == "text":
                raise BridgekitError(
                    f"the column `{column.name}` contains numbers in the index but text here",
                    where=listing.source,
                    remedy="rename the column, or index into another --out",
                )
        missing = [column for column in wanted if column.name not in schema.names]
        if missing:
            with clear_errors(self.path):
                table.add_columns(pa.schema(missing))
        return table

    def finish(self, report: Report = silent) -> None:
        """Compact tables, build approximate indexes for large ones, and measure their recall.

        Call it after adding everything. Until then, new rows are searched exactly.
        """
        for modality, table in self._tables.items():
            rows, built = self.rows(modality), self.approximate(modality)
            with clear_errors(self.path):
                if rows >= APPROXIMATE_FROM and (built is None or rows >= GROWN * built.rows):
                    report(f"building an index of {modality}", 0, rows)
                    lance.build_approximate(table)
                    lance.write_approximate(table, Approximate(KIND, rows, {}))
                    report(f"building an index of {modality}", rows, rows)
                lance.compact(table, CLEAN_AFTER)
        for modality, table in self._tables.items():
            built = self.approximate(modality)
            if built is not None and set(built.recall) != set(self._tables):
                recall = {query: self._recall(modality, query) for query in self._tables}
                with clear_errors(self.path):
                    lance.write_approximate(table, replace(built, recall=recall))

    def _recall(self, modality: str, query: str) -> float:
        """recall@10 of a table's approximate index against exact search, with a sample of stored vectors as queries.

        The query's own row is excluded. A hit counts if it is at least as similar as the tenth exact hit.
        """
        k = 10
        with clear_errors(self.path):
            source = self._table(query)
            count = source.count_rows()
            chosen = np.random.default_rng(0).choice(count, min(RECALL_QUERIES, count), replace=False)
            sample = source.take_offsets(sorted(chosen.tolist())).select(["content", "vector"]).to_arrow()
            queries, own = lance.matrix(sample["vector"].combine_chunks()), sample["content"].to_pylist()
            best = torch.full((len(queries), k), -torch.inf)
            for batch in self._table(modality).search().select(["content", "vector"]).to_batches(8_192):
                scores = queries @ lance.matrix(batch["vector"]).T
                if query == modality:
                    at = {key: column for column, key in enumerate(batch["content"].to_pylist())}
                    for row, key in enumerate(own):
                        if key in at:
                            scores[row, at[key]] = -torch.inf
                best = torch.cat([best, scores], 1).topk(k, dim=1).values
        found = 0
        for row, (key, hits) in enumerate(zip(own, self.search(queries, modality, k + 1).hits, strict=True)):
            others = [hit for hit in hits if query != modality or hit.columns["content"] != key][:k]
            found += sum(hit.similarity >= float(best[row, -1]) - 1e-5 for hit in others)
        return found / (k * len(queries))

    # ---- searching

    def search(
        self,
        vectors: Tensor,
        to: str,
        k: int = 10,
        *,
        where: str | None = None,
        exact: bool = False,
        penalty: Callable[[Tensor], Tensor | None] | None = None,
    ) -> SearchResult:
        """The k nearest rows of one modality for each vector.

        Arguments:
            vectors: (n, dim) float32, unit length, from the same bridge.
            to: the modality to search.
            k: hits per query.
            where: a filter on the columns, e.g. "split = 'test' and year >= 1990"; see `bridgekit_index.filters`.
            exact: never use the approximate index.
            penalty: what rows with these vectors, (m, dim), lose of their similarity, see `Bridge.hub_penalty`. It orders the
                `AHEAD * k` most similar rows.

        Raises:
            BridgekitError: the index lacks this modality, or the filter is invalid.
        """
        table, columns = self._table(to), self.columns(to)
        sql = None if where is None else check_filter(where, columns)
        try:
            with clear_errors(self.path):
                candidates = table.count_rows(sql)
        except BridgekitError as error:
            if where is None:
                raise
            raise unusable_filter(where, columns, error.what.removeprefix(lance.UNUSABLE)) from None
        built = None if exact or candidates < APPROXIMATE_FROM else self.approximate(to)
        hits: list[list[Hit]] = [[] for _ in range(len(vectors))]
        if not candidates:
            return SearchResult(hits, 0, None)
        with clear_errors(self.path):
            query = table.search(vectors.detach().cpu().numpy(), vector_column_name="vector", query_type="vector")
            chosen = [*columns, "_distance", *(["vector"] if penalty else [])]
            query = query.distance_type("cosine").limit(AHEAD * k if penalty else k).select(chosen)  # type: ignore[attr-defined]
            if sql is not None:
                query = query.where(sql, prefilter=True)
            query = query.nprobes(PROBES).refine_factor(REFINE) if built else query.bypass_vector_index()
            found = query.to_arrow()
        lost = penalty(lance.matrix(found["vector"].combine_chunks())) if penalty and len(found) else None
        scored: list[list[tuple[float, Hit]]] = [[] for _ in range(len(vectors))]
        for place, row in enumerate(found.select([name for name in found.column_names if name != "vector"]).to_pylist()):
            item, distance, number = row.pop("item"), row.pop("_distance"), row.pop("query_index", 0)
            cells = {name: int(cell) if isinstance(cell, float) and cell.is_integer() else cell for name, cell in row.items()}
            score = 1 - distance - (0.0 if lost is None else float(lost[place]))
            scored[number].append((score, Hit(item, 1 - distance, cells)))
        hits = [[hit for _, hit in sorted(each, key=lambda one: -one[0])[:k]] for each in scored]
        return SearchResult(hits, candidates, built)

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
    ) -> SearchResult:
        """`search` with items as queries. Only the queries' encoder is opened.

        Raises:
            ItemError: a query cannot be used.
            BridgekitError: see `check` and `search`.
        """
        self.check(bridge)
        self._table(to)
        if where is not None:
            check_filter(where, self.columns(to))  # fail before opening an encoder
        embedded = bridge.embed(modality, queries, report=report)
        penalty = partial(bridge.hub_penalty, modality, to) if f"{modality}/{to}" in bridge.banks else None
        return self.search(embedded, to, k, where=where, exact=exact, penalty=penalty)


class _Rows:
    """A listing as rows of a table, without vectors. Columns of the schema that the listing lacks are null."""

    def __init__(self, listing: Listing, schema: pa.Schema) -> None:
        self.schema = schema
        self.source = listing.source
        self.values: dict[str, list[str | float | None]] = {}
        cells = _columns(listing)
        for name in schema.names:
            if name == "item":
                self.values[name] = [str(item) for item in listing.items]
            elif name == "source":
                self.values[name] = [listing.source] * len(listing)
            elif name not in lance.OWN and name in cells:
                number = holds(schema.field(name)) == "numbers"
                self.values[name] = [(float(cell) if number else cell) if cell else None for cell in cells[name]]
            elif name not in lance.OWN:
                self.values[name] = [None] * len(listing)

    def compare(self, table: Table, positions: Mapping[str, int]) -> tuple[set[str], set[str], dict[str, str]]:
        """Keys of unchanged rows, keys of changed rows, and key to item of rows no longer in the source."""
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

    def arrow(self, keys: Sequence[str], positions: Sequence[int], vectors: Tensor) -> pa.Table:
        """These rows with their vectors, (len(keys), dim)."""
        columns: dict[str, Any] = {name: [cells[at] for at in positions] for name, cells in self.values.items()}
        columns["content"] = keys
        flat = pa.array(vectors.contiguous().numpy().ravel())
        columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        arrays = [pa.array(columns[field.name], field.type) for field in self.schema if field.name != "vector"]
        arrays.insert(self.schema.get_field_index("vector"), columns["vector"])
        return pa.Table.from_arrays(arrays, schema=self.schema)


class _Pending:
    """Buffers rows: every write creates files."""

    def __init__(self, table: Table, place: str, *, update: bool) -> None:
        self._table, self._place, self._update = table, place, update
        self._rows: list[pa.Table] = []
        self._since = time.monotonic()

    def add(self, rows: pa.Table) -> None:
        self._rows.append(rows)
        if time.monotonic() - self._since >= COMMIT_SECONDS:
            self.write()

    def write(self) -> None:
        rows, self._rows, self._since = self._rows, [], time.monotonic()
        if rows:
            with clear_errors(self._place):
                lance.merge(self._table, rows, update=self._update)


def _is_url(path: str | Path) -> bool:
    return bool(_URL.match(str(path)))


def _embed(
    bridge: Bridge, listing: Listing, positions: Sequence[int], done: int, total: int, report: Report
) -> tuple[Tensor, Mapping[int, str]]:
    """Vectors of the usable items at these positions, and failures: place to reason."""
    latents = encode_items(
        bridge.encoder(listing.modality),
        [listing.items[position] for position in positions],
        report=lambda _, some, __: report(f"indexing {listing.modality}", done + some, total),
    )
    matrix = latents.matrix[torch.from_numpy(latents.ids[latents.ids >= 0])]
    return bridge.project(listing.modality, matrix).cpu(), latents.failed


def _identity(bridge: Bridge, modality: str) -> tuple[str, str]:
    """Identifies an embedding space: the encoder's revision and the hash of the adapter."""
    return bridge.side(modality).revision, bridge.weights_hash([modality])


def _columns(listing: Listing) -> dict[str, Sequence[str]]:
    """The listing's non-empty columns, renamed if LanceDB rejects a name or bridgekit reserves it."""
    columns: dict[str, Sequence[str]] = {}
    for name, cells in listing.cells.items():
        clean = re.sub(r"[.`\x00-\x1f]", "_", name)
        if clean.lower() in lance.OWN or clean.startswith("_"):
            clean = clean.strip("_") + "_"
        if any(cells):
            columns.setdefault(clean, cells)
    return columns


def _fields(listing: Listing) -> list[pa.Field]:
    return [
        pa.field(name, pa.float64() if all(_NUMBER.fullmatch(cell) for cell in cells if cell) else pa.string())
        for name, cells in _columns(listing).items()
    ]


def _contents(listing: Listing) -> tuple[dict[str, int], dict[int, str]]:
    """Content hash to the position of its first item, and position to reason for unreadable items."""

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


def _set_aside(listing: Listing, reasons: Mapping[int, str]) -> list[SetAside]:
    """All unusable rows: those found while reading the table, and those at these positions."""
    found = (
        SetAside(listing.row(position), listing.modality, str(listing.items[position])[:200], reason)
        for position, reason in sorted(reasons.items())
    )
    return [*listing.set_aside, *found]


def _refuse(listing: Listing, reasons: Mapping[int, str]) -> None:
    """Raise BridgekitError if any item is unusable."""
    if set_aside := _set_aside(listing, reasons):
        first = set_aside[0]
        raise BridgekitError(
            f"{len(set_aside)} of {len(listing) + len(listing.set_aside)} items cannot be used: {first.reason}",
            where=f"{listing.source}, row {first.row}: {first.item}",
            remedy="fix or remove them, or omit --strict to have them set aside",
        )
