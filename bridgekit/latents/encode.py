"""Latents of items: read from the store, or encoded and stored."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bridgekit.encoders import Concatenated, Encoder, Item
from bridgekit.errors import ItemError
from bridgekit.hardware import VARIABLE, threads
from bridgekit.latents.batches import FLOAT32, Batch, Precision, Run, check_precision, encode_batches, may_reduce, plan_batches
from bridgekit.latents.store import Latents, LatentStore, LatentsVanished
from bridgekit.media import hash_and_size
from bridgekit.pairs import Column
from bridgekit.progress import Report, silent
from bridgekit.storage.bounded import parse_json, read_bounded
from bridgekit.storage.cache import check_writable, write_text_atomically

#: Latents are buffered for at most this long, or this many rows, before they are written. A killed run loses the buffer.
FLUSH_SECONDS = 2.0
FLUSH_ROWS = 8_192
#: How many small shards accumulate during a run before they are merged.
MANY_DURING = 64
#: Batches are made of this many items that follow each other in the table, or fewer if they are this large together.
WINDOW, WINDOW_BYTES = 8_192, 256 << 20
#: How often a run tries to encode what is missing from the store.
ROUNDS = 3


@dataclass(frozen=True)
class EncodedSide:
    """What encoding one side of a table did.

    Arguments:
        encoder: `provider:model`.
        items: distinct items that could be used.
        encoded: how many of them were encoded now.
        failed: items that could not be used.
        seconds: how long encoding took.
        precision: of those encoded now.
        folder: where they are stored.
    """

    encoder: str
    items: int
    encoded: int
    failed: int
    seconds: float
    precision: Precision
    folder: str

    @classmethod
    def of(cls, encoder: str, found: Latents) -> EncodedSide:
        """The summary of what `encode_items` returned."""
        counts = len(found.matrix), found.encoded, len(found.failed)
        return cls(encoder, *counts, found.seconds, found.precision, str(found.folder))


def encode_items(
    encoder: Encoder,
    items: Sequence[Item | None],
    *,
    report: Report = silent,
    folder: Path | None = None,
    run: Run | None = None,
    half: bool = False,
) -> Latents:
    """The latents of items: read from the store, or encoded and stored.

    Large numbers of items are encoded in bfloat16 if that is faster and close enough to float32: see
    `bridgekit.latents.batches.check_precision`.

    Arguments:
        encoder: an opened encoder.
        items: paths or texts; None is a missing item. Those that cannot be encoded are listed in `Latents.failed`.
        report: progress of the items to encode.
        folder: the latent store's folder, for tests.
        run: encodes batches with the same encoder, for example on other machines; the default is `encode_batches`.
        half: return them in half precision. They are stored in float32 anyway.

    Raises:
        PluginError: the encoder violates its contract.
    """
    if isinstance(encoder, Concatenated) and run is None:
        return join_latents([encode_items(part, items, report=report, folder=folder, half=half) for part in encoder.parts])
    column = Column.of(items)
    hashed = _hash_all(column)
    first: dict[bytes, Item] = {}
    sizes: dict[bytes, int] = {}
    for code in column.firsts().tolist():
        if not isinstance(found := hashed[code], ItemError):
            first.setdefault(found[0], column.value(code))
            sizes.setdefault(*found)
    by_code = {code: found[0] for code, found in hashed.items() if not isinstance(found, ItemError)}
    reason_of = {code: found.reason for code, found in hashed.items() if isinstance(found, ItemError)}
    digests = [by_code.get(code) for code in column.codes.tolist()]
    failed = {at: reason_of[code] for at, code in enumerate(column.codes.tolist()) if code in reason_of}
    store = LatentStore(encoder.revision, encoder.dim, folder)

    # Batches are planned over all items, including stored ones, by length and content: a resumed run has the same batches, so
    # its latents, and the adapters trained on them, are bit-identical.
    plan = [batch for window in _windows(sizes) for batch in plan_batches(window)]
    contents = {digest: first[digest] for digest in chain.from_iterable(plan)}

    encode, task = run or partial(encode_batches, encoder), f"encoding {encoder.modality}"
    precision, reasons, encoded, seconds = FLOAT32, dict[bytes, str](), 0, 0.0
    for left in reversed(range(ROUNDS)):  # damaged latents are only detected when read
        missing = [[digest for digest in batch if digest not in store and digest not in reasons] for batch in plan]
        missing = [batch for batch in missing if batch]
        total = sum(map(len, missing))
        if total:
            started = time.monotonic()
            check_writable(store.folder)  # before hours of encoding, not after
            note = store.folder / f"begun-{hashlib.sha256(b''.join(contents)).hexdigest()[:32]}.json"
            report(task, 0, total)
            compare = may_reduce(encoder, total, run is not None)
            precision = _precision(encode, list(contents.values()), note, compare)
            bad = _encode_missing(encode, missing, contents, store, precision, partial(report, task))
            store.merge_small_shards()
            note.unlink(missing_ok=True)
            reasons |= bad
            encoded += total - len(bad)
            seconds += time.monotonic() - started
        usable = [digest for digest in first if digest not in reasons]
        try:
            matrix = store.read(usable, half)
            break
        except LatentsVanished:
            if not left:
                raise

    row_of = {digest: row for row, digest in enumerate(usable)}
    ids = np.array([row_of.get(digest, -1) if digest else -1 for digest in digests], dtype=np.int64)
    failed |= {position: reasons[digest] for position, digest in enumerate(digests) if digest in reasons}
    whole = hashlib.sha256(encoder.revision.encode() + b"".join(digest or b"-" for digest in digests))
    return Latents(matrix, ids, failed, encoded, whole.hexdigest(), precision, seconds, store.folder, usable)


def join_latents(parts: Sequence[Latents]) -> Latents:
    """What several encoders gave for the same items, one after the other: items that failed with one of them have failed."""
    places = [{content: row for row, content in enumerate(part.contents)} for part in parts]
    usable = [content for content in parts[0].contents if all(content in place for place in places)]
    rows = [torch.tensor([place[content] for content in usable], dtype=torch.int64) for place in places]
    new = np.full(len(parts[0].contents) + 1, -1)  # the last one is for what is missing
    new[rows[0].numpy()] = np.arange(len(usable))
    return replace(
        parts[0],
        matrix=torch.cat([part.matrix[own] for part, own in zip(parts, rows, strict=True)], 1),
        ids=new[parts[0].ids],
        failed={at: reason for part in reversed(parts) for at, reason in part.failed.items()},
        encoded=max(part.encoded for part in parts),
        fingerprint=hashlib.sha256("+".join(part.fingerprint for part in parts).encode()).hexdigest(),
        seconds=sum(part.seconds for part in parts),
        contents=usable,
    )


def _precision(run: Run, items: Sequence[Item], note: Path, compare: bool) -> Precision:
    """The precision of a run. A resumed run keeps the one recorded in its note."""
    if os.environ.get(VARIABLE) == "float32":
        return FLOAT32
    with suppress(OSError, ValueError, TypeError):  # a damaged note is ignored
        recorded, _, seal = read_bounded(note, 1 << 16).rpartition(b"\n")
        if hashlib.sha256(recorded).hexdigest() == seal.decode():
            return Precision(**parse_json(recorded))
    if not compare:
        return FLOAT32
    precision = check_precision(run, items)
    found = json.dumps(asdict(precision))
    write_text_atomically(note, f"{found}\n{hashlib.sha256(found.encode()).hexdigest()}")
    return precision


def _encode_missing(
    run: Run,
    missing: Sequence[Sequence[bytes]],
    contents: Mapping[bytes, Item],
    store: LatentStore,
    precision: Precision,
    progress: Callable[[int, int], object],
) -> dict[bytes, str]:
    """Encode and store the missing items, even if interrupted. Returns the error messages of those that fail."""
    reasons: dict[bytes, str] = {}
    done, total = 0, sum(map(len, missing))
    reduced = precision.products != FLOAT32.products
    batches = [Batch(number, [contents[digest] for digest in batch], reduced) for number, batch in enumerate(missing)]
    with LatentWriter(store) as writer, closing(run(batches)) as results:
        for result in results:
            batch = missing[result.number]
            reasons |= {batch[at]: reason for at, reason in result.reasons.items()}
            if result.kept:
                writer.add([batch[at] for at in result.kept], result.latents, precision)
            writer.flush_when_due()
            done += len(batch)
            progress(done, total)
    return reasons


class LatentWriter:
    """Writes latents into a store every few seconds, and the last ones when its context ends, also by an error."""

    def __init__(self, store: LatentStore) -> None:
        self._store = store
        self._waiting: dict[Precision, list[tuple[Sequence[bytes], Tensor]]] = {}
        self._rows = 0
        self._flushed = time.monotonic()

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()

    def add(self, digests: Sequence[bytes], latents: Tensor, precision: Precision) -> None:
        """Take latents of shape (len(digests), dim)."""
        self._waiting.setdefault(precision, []).append((digests, latents))
        self._rows += len(digests)

    def flush_when_due(self) -> None:
        """Write what waits, if it is much or has waited for long."""
        if time.monotonic() - self._flushed >= FLUSH_SECONDS or self._rows >= FLUSH_ROWS:
            self._flush()
            self._store.merge_small_shards(MANY_DURING)
            self._flushed = time.monotonic()

    def _flush(self) -> None:
        for precision, waiting in self._waiting.items():
            every = [digest for digests, _ in waiting for digest in digests]
            self._store.write(every, torch.cat([rows for _, rows in waiting]), precision)
        self._waiting.clear()
        self._rows = 0


def _windows(sizes: Mapping[bytes, int]) -> Iterator[dict[bytes, int]]:
    """Contents with their sizes, in pieces of the table's order, each sorted by size and content.

    Batches are made within such a window, so that items of a table or an archive are read in about the order they are in.
    """
    window: dict[bytes, int] = {}
    total = 0
    for digest, size in sizes.items():
        if window and (len(window) == WINDOW or total + size > WINDOW_BYTES):
            yield dict(sorted(window.items(), key=lambda entry: (entry[1], entry[0])))
            window, total = {}, 0
        window[digest] = size
        total += size
    yield dict(sorted(window.items(), key=lambda entry: (entry[1], entry[0])))


def _hash_all(column: Column[Item | None]) -> dict[int, tuple[bytes, int] | ItemError]:
    """The content hash and size of each distinct item, by its code, or why it cannot be read."""

    def one(code: int) -> tuple[bytes, int] | ItemError:
        try:
            item = column.value(code)
            assert item is not None
            return hash_and_size(item)
        except ItemError as error:
            return error

    codes = column.firsts().tolist()
    pieces = [codes[start : start + 64] for start in range(0, len(codes), 64)]
    hashed: dict[int, tuple[bytes, int] | ItemError] = {}
    with ThreadPoolExecutor(threads()) as pool:  # in pieces, since dispatching a text takes longer than hashing it
        for piece, found in zip(pieces, pool.map(lambda piece: [one(code) for code in piece], pieces), strict=True):
            hashed |= zip(piece, found, strict=True)
    return hashed
