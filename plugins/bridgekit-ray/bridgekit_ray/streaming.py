"""Encoding a table that workers read themselves: no row passes through the driver, only digests and latents."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
import torch
from numpy.typing import NDArray

from bridgekit.encoders import TEXT, Encoder, Item
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.hardware import threads
from bridgekit.latents.batches import FLOAT32, Batch, Precision, check_precision, encode_batches, may_reduce, plan_batches
from bridgekit.latents.encode import WINDOW, WINDOW_BYTES, EncodedSide, LatentWriter
from bridgekit.latents.store import LatentStore
from bridgekit.media import hash_and_size, item_name
from bridgekit.pairs import SetAside
from bridgekit.progress import Report, say
from bridgekit.storage.cache import check_writable
from bridgekit.tables.columns import check_column, find_column
from bridgekit.tables.reading import Table
from bridgekit_ray.encoding import count_workers, fault_of, open_on_worker, raise_fault, worker_failures
from bridgekit_ray.tables import Piece, Row, as_table, describe, find_files, is_shards, read_rows

T = TypeVar("T")
#: How often a piece is tried again if its worker dies: its machine may be taken away, or a damaged file may crash Arrow.
TRIES = 2


@dataclass(frozen=True)
class ClusterTable:
    """A table that workers read.

    Arguments:
        table: its columns, without rows.
        pieces: what workers read at a time.
        kinds: column to its kind, see `bridgekit.decoding.tables.describe_table`.
    """

    table: Table
    pieces: Sequence[Piece]
    kinds: Mapping[str, str]


def open_on_cluster(source: object, columns: Mapping[str, str]) -> ClusterTable | None:
    """A table that workers can read: Parquet or WebDataset, by path or URL. None if the driver must read it.

    Workers read the footers of all Parquet files, or the first samples of the first shard.

    Arguments:
        source: see `bridgekit_ray.tables.find_files`.
        columns: modality to the name of its column, where that is not the modality's.

    Raises:
        BridgekitError: a file cannot be read, or Parquet files have different columns.
    """
    urls = find_files(source)
    if urls is None:
        return None
    shards = is_shards(str(source))
    rows = [{"url": url, "shards": shards} for url in (urls[:1] if shards else urls)]
    with worker_failures(str(source)):
        found = {row["url"]: json.loads(row["facts"]) for row in ray.data.from_items(rows).map(_described).iter_rows()}
    for url in urls:
        raise_fault(found.get(url, {}).get("fault"))
    facts = found[urls[0]]
    other = next((url for url in found if found[url]["names"] != facts["names"]), None)
    if other is not None:
        raise BridgekitError("this file has other columns than the first one", where=other, remedy="give one table at a time")
    pieces = [Piece(url) for url in urls] if shards else [piece for url in urls for piece in _groups(url, found[url]["groups"])]
    kinds = dict(zip(facts["names"], facts["kinds"], strict=True))
    table = as_table(str(source), facts, columns)
    if not shards and "://" not in str(source) and "bytes" not in kinds.values():
        return None  # its files lie beside it: the driver hashes them, and workers open them
    return ClusterTable(table, pieces, kinds)


def _described(row: dict[str, Any]) -> dict[str, str]:
    try:
        facts = describe(row["url"], bool(row["shards"]))
    except BridgekitError as error:
        facts = {"fault": fault_of(error)}
    return {"url": row["url"], "facts": json.dumps(facts)}


def _groups(url: str, counts: Sequence[int]) -> Iterator[Piece]:
    first = 0
    for number, rows in enumerate(counts):
        yield Piece(url, number, first)
        first += rows


def _column(table: Table, features: Mapping[str, str], modality: str) -> str | None:
    return find_column(modality, list(table.load().names), table.given, features)


def encode_on_cluster(
    source: ClusterTable, sides: Mapping[str, tuple[str, Encoder]], report: Report
) -> tuple[int, dict[str, EncodedSide], list[SetAside]]:
    """Encode a table that workers read, and store the latents here.

    Workers leave out what the store has: they get its digests, 32 bytes each, once per machine. Each worker plans its batches
    over up to `WINDOW` rows of a piece, and an item that is in several of these is encoded in each.

    Arguments:
        source: the table.
        sides: modality to the full name and the encoder, opened here.
        report: progress, in pieces.

    Returns:
        the number of usable rows, modality to a summary, and the other rows.

    Raises:
        BridgekitError: a column is missing or holds something else, or a worker fails.
    """
    columns = {modality: _checked_column(source, modality) for modality in sides}
    stores = {modality: LatentStore(encoder.revision, encoder.dim) for modality, (_, encoder) in sides.items()}
    for store in stores.values():
        check_writable(store.folder)
    task, started = f"encoding {', '.join(sides)}", time.monotonic()
    tally = _Tally(dict.fromkeys(sides, FLOAT32))
    report(task, 0, len(source.pieces))
    with ExitStack() as stack:
        writers = {modality: stack.enter_context(LatentWriter(store)) for modality, store in stores.items()}
        for row in _results(source, sides, columns, stores):
            tally.add(row)
            if row["modality"] and row["digests"]:
                encoder = sides[row["modality"]][1]
                latents = np.frombuffer(row["latents"], np.float32).reshape(-1, encoder.dim)
                new = [row["digests"][at : at + 32] for at in range(0, len(row["digests"]), 32)]
                writers[row["modality"]].add(new, torch.from_numpy(latents.copy()), _precision_of(row))
                writers[row["modality"]].flush_when_due()
            report(task, tally.pieces, len(source.pieces))
    for store in stores.values():
        store.merge_small_shards()
    seconds = time.monotonic() - started
    done = {
        modality: tally.side(modality, name, seconds, str(stores[modality].folder)) for modality, (name, _) in sides.items()
    }
    return tally.rows, done, tally.set_aside


def _checked_column(source: ClusterTable, modality: str) -> str:
    """The column of a modality, announced if it was guessed."""
    table, records = source.table, source.table.load()
    found = _column(table, records.features, modality)
    name = check_column(modality, found, list(records.names), table.given, table.source)
    if name.casefold() != modality.casefold() and modality not in table.given:
        say(f"{modality} from the column `{name}` (name another with --column {modality}=NAME)")
    kind = source.kinds[name]
    if kind not in (("text", "texts") if modality == TEXT else ("bytes",)):
        what = "texts" if kind in ("text", "texts") else "files" if kind == "bytes" else kind
        raise BridgekitError(
            f"the column `{name}` for {modality} holds {what}",
            where=table.source,
            remedy=f"name another with --column {modality}=NAME, or omit --ray",
        )
    return name


def _results(
    source: ClusterTable,
    sides: Mapping[str, tuple[str, Encoder]],
    columns: Mapping[str, str],
    stores: Mapping[str, LatentStore],
) -> Generator[dict[str, Any], None, None]:
    """The rows that workers return."""
    number, resources = count_workers(len(source.pieces))
    # In lists: Ray would replace a bare reference by its value, for each worker anew.
    known = {modality: [ray.put(np.sort(_as_strings(store.digests)))] for modality, store in stores.items()}
    named = {modality: (name, encoder.revision) for modality, (name, encoder) in sides.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.64 removes the argument for retries: see pyproject.toml
        dataset = ray.data.from_items(
            [{"piece": piece.as_json(), "at": at} for at, piece in enumerate(source.pieces)]
        ).map_batches(
            TableWorker,
            fn_constructor_kwargs={"sides": named, "known": known, "columns": dict(columns)},
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=number),
            ray_remote_args_fn=lambda: {"max_task_retries": TRIES},
            **resources,
        )
    with worker_failures(", ".join(name for name, _ in named.values())):
        for row in dataset.iter_rows():
            row["about"] = json.loads(row["about"])
            raise_fault(row["about"].get("fault"))
            yield row


@dataclass
class _Tally:
    """What has come back from workers."""

    precisions: dict[str, Precision]
    rows: int = 0
    pieces: int = 0
    aside: list[tuple[int, SetAside]] = field(default_factory=list)
    keys: dict[str, list[NDArray[np.uint64]]] = field(default_factory=dict)
    new: dict[str, list[NDArray[np.uint64]]] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        about, modality = row["about"], row["modality"]
        self.pieces += about.get("pieces", 0)
        self.rows += about.get("rows", 0)
        self.aside += [(about["at"], SetAside(**each)) for each in about.get("set_aside", ())]
        if modality:
            self.keys.setdefault(modality, []).append(np.frombuffer(row["keys"], np.uint64))
            self.new.setdefault(modality, []).append(np.frombuffer(row["digests"], np.uint64)[::4])
            self.failed[modality] = self.failed.get(modality, 0) + about["failed"]
            if row["digests"]:
                self.precisions[modality] = min(self.precisions[modality], _precision_of(row), key=_agreement)

    @property
    def set_aside(self) -> list[SetAside]:
        """The rows that cannot be used, in the table's order: pieces come back in any."""
        return [row for _, row in sorted(self.aside, key=lambda each: each[0])]

    def side(self, modality: str, name: str, seconds: float, folder: str) -> EncodedSide:
        """The summary of a modality. Items are told apart by the first 8 bytes of their hashes."""
        items, encoded = (
            len(np.unique(np.concatenate([np.zeros(0, np.uint64), *found.get(modality, [])])))
            for found in (self.keys, self.new)
        )
        return EncodedSide(name, items, encoded, self.failed.get(modality, 0), seconds, self.precisions[modality], folder)


def _precision_of(row: Mapping[str, Any]) -> Precision:
    return Precision(**row["about"]["precision"])


def _agreement(precision: Precision) -> float:
    return 2.0 if precision.agreement is None else precision.agreement


def _as_strings(digests: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    return np.ascontiguousarray(digests).view("S32")[:, 0]


# ---- on workers


class TableWorker:
    """An actor that reads pieces of a table and encodes what is new in them.

    Arguments:
        sides: modality to the encoder's name and revision.
        known: modality to a list with the reference of the sorted digests that are stored already.
        columns: modality to its column.
    """

    def __init__(
        self, sides: Mapping[str, tuple[str, str]], known: Mapping[str, list[Any]], columns: Mapping[str, str]
    ) -> None:
        self._sides, self._columns = sides, columns
        self._known = {modality: ray.get(reference) for modality, (reference,) in known.items()}
        self._encoders: dict[str, Encoder] = {}
        self._precisions: dict[str, Precision] = {}

    def __call__(self, table: Any) -> Iterator[Any]:
        """Encode the piece in a table of one row. Yields tables of results."""
        piece, at = Piece(**json.loads(table.column("piece")[0].as_py())), table.column("at")[0].as_py()
        try:
            for block in _ahead(_blocks(read_rows(piece, self._columns))):
                yield from self._encode(block, at)
            yield _result({"pieces": 1})
        except BridgekitError as error:
            yield _result({"fault": fault_of(error)})  # a row, because Ray wraps exceptions in its own types

    def _encode(self, block: Sequence[Row | SetAside], place: int) -> Iterator[Any]:
        rows = [row for row in block if isinstance(row, Row)]
        aside = [each for each in block if isinstance(each, SetAside)]
        digest_of = self._hash(rows)
        reasons: dict[tuple[str, bytes], str] = {}
        for modality in self._columns:
            items: dict[bytes, tuple[Item, int]] = {}
            for (number, at), found in digest_of[modality].items():
                if not isinstance(found, ItemError):
                    item = rows[number].cells[modality][at]
                    assert item is not None
                    items.setdefault(found[0], (item, found[1]))
            yield self._encode_side(modality, items, reasons)
        usable = 0
        for number, row in enumerate(rows):
            for pair in _pairs(row):
                why = self._why_not(number, row, pair, digest_of, reasons)
                usable += why is None
                aside += [why] if why else []
        yield _result({"rows": usable, "at": place, "set_aside": [asdict(each) for each in aside]})

    def _hash(self, rows: Sequence[Row]) -> dict[str, dict[tuple[int, int], tuple[bytes, int] | ItemError]]:
        """Modality to the hash and size of each item, by its place, or why it cannot be read."""
        hashed: dict[str, dict[tuple[int, int], tuple[bytes, int] | ItemError]] = {}
        with ThreadPoolExecutor(threads()) as pool:
            for modality in self._columns:
                places = [
                    (number, at) for number, row in enumerate(rows) for at, item in enumerate(row.cells[modality]) if item
                ]
                items = [rows[number].cells[modality][at] for number, at in places]
                hashed[modality] = dict(zip(places, pool.map(_hashed, items), strict=True))
        return hashed

    def _encode_side(
        self, modality: str, items: Mapping[bytes, tuple[Item, int]], reasons: dict[tuple[str, bytes], str]
    ) -> Any:
        """Encode what is not known of these items; adds to `reasons` why some cannot be."""
        missing = {digest: each for digest, each in items.items() if not self._is_known(modality, digest)}
        done: list[tuple[list[bytes], torch.Tensor]] = []
        failed = 0
        precision = FLOAT32
        if missing:
            encoder = self._encoder(modality)
            order = sorted(missing, key=lambda digest: (missing[digest][1], digest))
            plan = plan_batches({digest: missing[digest][1] for digest in order})
            precision = self._precision(modality, encoder, [missing[digest][0] for digest in order])
            reduced = precision.products != FLOAT32.products
            batches = [Batch(number, [missing[digest][0] for digest in each], reduced) for number, each in enumerate(plan)]
            for result in encode_batches(encoder, batches):
                batch = plan[result.number]
                done.append(([batch[at] for at in result.kept], result.latents))
                reasons |= {(modality, batch[at]): reason for at, reason in result.reasons.items()}
                failed += len(result.reasons)
        about = {"failed": failed, "precision": asdict(precision)}
        latents = torch.cat([rows for _, rows in done]).contiguous().numpy().tobytes() if done else b""
        keys = b"".join(digest[:8] for digest in items if (modality, digest) not in reasons)
        return _result(about, modality, b"".join(digest for digests, _ in done for digest in digests), latents, keys)

    def _is_known(self, modality: str, digest: bytes) -> bool:
        known = self._known[modality]
        at = int(np.searchsorted(known, np.bytes_(digest)))
        return at < len(known) and bool(known[at] == digest.rstrip(b"\0"))  # NumPy leaves out zeros at the end

    def _encoder(self, modality: str) -> Encoder:
        if modality not in self._encoders:
            self._encoders[modality] = open_on_worker(*self._sides[modality])
        return self._encoders[modality]

    def _precision(self, modality: str, encoder: Encoder, items: Sequence[Item]) -> Precision:
        """The precision of this worker, from the first block that is large enough to tell."""
        if modality in self._precisions or not may_reduce(encoder, len(items), elsewhere=False):
            return self._precisions.get(modality, FLOAT32)
        self._precisions[modality] = check_precision(partial(encode_batches, encoder), items)
        return self._precisions[modality]

    def _why_not(
        self,
        number: int,
        row: Row,
        pair: Mapping[str, int],
        digest_of: Mapping[str, Mapping[tuple[int, int], tuple[bytes, int] | ItemError]],
        reasons: Mapping[tuple[str, bytes], str],
    ) -> SetAside | None:
        """Why a pair of a row cannot be used; None if it can."""
        for modality, at in pair.items():
            item, found = row.cells[modality][at], digest_of[modality].get((number, at))
            if isinstance(found, ItemError):
                return SetAside(row.number, modality, _shown(item), found.reason)
            if found is not None and (reason := reasons.get((modality, found[0]))):
                return SetAside(row.number, modality, _shown(item), reason)
        missing = [modality for modality, at in pair.items() if row.cells[modality][at] is None]
        if len(pair) - len(missing) < min(2, len(pair)):
            return SetAside(row.number, missing[0], row.where, "no item in this column, and a pair needs two")
        return None


def _pairs(row: Row) -> Iterator[dict[str, int]]:
    """Of each pair in a row modality to the place of its item: a pair for each text of a list."""
    lists = [modality for modality, items in row.cells.items() if len(items) > 1]
    if len(lists) > 1:
        raise BridgekitError(f"the columns for {' and '.join(lists)} both have lists", where=row.where)
    for at in range(len(row.cells[lists[0]]) if lists else 1):
        yield {modality: at if modality in lists else 0 for modality in row.cells}


def _hashed(item: Item | None) -> tuple[bytes, int] | ItemError:
    assert item is not None
    try:
        return hash_and_size(item)
    except ItemError as error:
        return error


def _shown(item: Item | None) -> str:
    return item_name(item)[:200] if item is not None else ""


def _blocks(rows: Iterator[Row | SetAside]) -> Iterator[list[Row | SetAside]]:
    """Rows in windows of the size that a single machine plans its batches over."""
    block: list[Row | SetAside] = []
    size = 0
    for row in rows:
        own = row.size if isinstance(row, Row) else 0
        if block and (len(block) == WINDOW or size + own > WINDOW_BYTES):
            yield block
            block, size = [], 0
        block.append(row)
        size += own
    if block:
        yield block


def _ahead(source: Iterator[T]) -> Iterator[T]:
    """The same, with the next one made in a thread meanwhile: reading goes on while an encoder works."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, source, end)
        for _ in count():
            value: Any = coming.result()
            if value is end:
                return
            coming = pool.submit(next, source, end)
            yield value


def _result(about: Mapping[str, Any], modality: str = "", digests: bytes = b"", latents: bytes = b"", keys: bytes = b"") -> Any:
    """A row for the driver."""
    import pyarrow as pa

    binary = pa.large_binary()
    return pa.table(
        {
            "about": pa.array([json.dumps(about)]),
            "modality": pa.array([modality]),
            "digests": pa.array([digests], binary),
            "latents": pa.array([latents], binary),
            "keys": pa.array([keys], binary),
        }
    )
