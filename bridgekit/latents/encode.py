"""Items into latents: from the store where they are kept, by the encoder where they are not."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bridgekit.encoders import Encoder, Item
from bridgekit.errors import ItemError
from bridgekit.hardware import threads
from bridgekit.latents.batches import (
    FLOAT32,
    WORTH_CHECKING,
    Batch,
    Precision,
    Run,
    bfloat16_is_fast,
    bfloat16_is_refused,
    check_precision,
    encode_batches,
    plan_batches,
)
from bridgekit.latents.store import Latents, LatentStore, LatentsVanished
from bridgekit.media import content_hash, size_hint
from bridgekit.storage.bounded import parse_json, read_bounded
from bridgekit.storage.cache import check_writable, write_text_atomically

#: Seconds of work, and rows, that a killed run may lose: latents wait so long for others to be written with.
FLUSH_SECONDS = 2.0
FLUSH_ROWS = 8_192
MANY_DURING = 64
#: How often what has vanished from the store is encoded again, in one run.
ROUNDS = 3

Progress = Callable[[int, int], object]


def encode_items(
    encoder: Encoder,
    items: Sequence[Item | None],
    *,
    progress: Progress = lambda done, total: None,
    folder: Path | None = None,
    elsewhere: Run | None = None,
) -> Latents:
    """The latents of items, from the store where they are there, encoded and stored where they are not.

    Many items are encoded in bfloat16 where that is faster and near enough to float32: see
    `bridgekit.latents.batches.check_precision`.

    Arguments:
        encoder: an opened encoder.
        items: paths or texts; None is a hole.
        progress: called with (done, total) of the items to encode.
        folder: the latent store's folder, for tests.
        elsewhere: encodes batches on other machines, with the same encoder; the default is here.

    An item that cannot be read, or whose latents are not finite, fails alone: see `Latents.failed`.

    Raises:
        PluginError: the encoder does not keep its contract.
    """
    digests, failed = _hash_all(items)
    first_position: dict[bytes, int] = {}
    for position, digest in enumerate(digests):
        if digest is not None:
            first_position.setdefault(digest, position)
    store = LatentStore(encoder.revision, encoder.dim, folder)

    # Batches are planned over all items, stored ones too, by length and then content: a run that was killed meets the same
    # batches when it goes on, so its latents, and the adapters trained on them, are the same to the last bit.
    sizes = {digest: size_hint(_item(items, position)) for digest, position in first_position.items()}
    plan = plan_batches(dict(sorted(sizes.items(), key=lambda entry: (entry[1], entry[0]))))
    contents = {digest: _item(items, first_position[digest]) for digest in chain.from_iterable(plan)}

    precision, reasons, encoded, seconds = FLOAT32, dict[bytes, str](), 0, 0.0
    for left in reversed(range(ROUNDS)):  # that latents are damaged is only seen when they are read
        missing = [[digest for digest in batch if digest not in store and digest not in reasons] for batch in plan]
        missing = [batch for batch in missing if batch]
        total = sum(map(len, missing))
        if total:
            started = time.monotonic()
            check_writable(store.folder)  # before hours of encoding, not after
            progress(0, total)
            note = store.folder / f"begun-{hashlib.sha256(b''.join(contents)).hexdigest()[:32]}.json"
            run = elsewhere or partial(encode_batches, encoder)
            worth_checking = total >= WORTH_CHECKING and (elsewhere is not None or bfloat16_is_fast(encoder))
            precision = _precision(run, list(contents.values()), note, worth_checking)
            bad = _encode_missing(run, missing, contents, store, precision, progress)
            store.merge_small_shards()
            note.unlink(missing_ok=True)
            reasons |= bad
            encoded += total - len(bad)
            seconds += time.monotonic() - started
        usable = [digest for digest in first_position if digest not in reasons]
        try:
            matrix = store.read(usable)
            break
        except LatentsVanished:
            if not left:
                raise

    row_of = {digest: row for row, digest in enumerate(usable)}
    ids = np.array([row_of.get(digest, -1) if digest else -1 for digest in digests], dtype=np.int64)
    failed |= {position: reasons[digest] for position, digest in enumerate(digests) if digest in reasons}
    whole = hashlib.sha256(encoder.revision.encode() + b"".join(digest or b"-" for digest in digests))
    return Latents(matrix, ids, failed, encoded, whole.hexdigest(), precision, seconds, store.folder, usable)


def _precision(run: Run, items: Sequence[Item], note: Path, worth_checking: bool) -> Precision:
    """What a run computes in. One that goes on after it was stopped keeps to what it found at its start, by its note."""
    if bfloat16_is_refused():
        return FLOAT32
    with suppress(OSError, ValueError, TypeError):  # a damaged note is as good as none
        told, _, seal = read_bounded(note, 1 << 16).rpartition(b"\n")
        if hashlib.sha256(told).hexdigest() == seal.decode():
            return Precision(**parse_json(told))
    if not worth_checking:
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
    progress: Progress,
) -> dict[bytes, str]:
    """Encode and keep what is missing: the reasons of those that fail. Whatever ends this, what was encoded is kept."""
    reasons: dict[bytes, str] = {}
    waiting: list[tuple[list[bytes], Tensor]] = []
    done, total = 0, sum(map(len, missing))
    flushed = time.monotonic()

    def flush() -> None:
        if waiting:
            store.write(
                [digest for digests, _ in waiting for digest in digests], torch.cat([rows for _, rows in waiting]), precision
            )
            waiting.clear()

    reduced = precision.products != FLOAT32.products
    batches = [Batch(number, [contents[digest] for digest in batch], reduced) for number, batch in enumerate(missing)]
    try:
        with closing(run(batches)) as results:
            for result in results:
                batch = missing[result.number]
                reasons |= {batch[at]: reason for at, reason in result.reasons.items()}
                if result.kept:
                    waiting.append(([batch[at] for at in result.kept], result.latents))
                if time.monotonic() - flushed >= FLUSH_SECONDS or sum(len(rows) for _, rows in waiting) >= FLUSH_ROWS:
                    flush()
                    store.merge_small_shards(MANY_DURING)
                    flushed = time.monotonic()
                done += len(batch)
                progress(done, total)
    finally:
        flush()
    return reasons


def _hash_all(items: Sequence[Item | None]) -> tuple[list[bytes | None], dict[int, str]]:
    """Content hashes, None for holes and missing files, and the reasons of the latter."""

    def one(item: Item | None) -> bytes | ItemError | None:
        try:
            return None if item is None else content_hash(item)
        except ItemError as error:
            return error

    pieces = [items[start : start + 64] for start in range(0, len(items), 64)]
    with ThreadPoolExecutor(threads()) as pool:  # in pieces: handing over a text takes longer than hashing it
        results = [result for piece in pool.map(lambda piece: [one(item) for item in piece], pieces) for result in piece]
    failed = {position: result.reason for position, result in enumerate(results) if isinstance(result, ItemError)}
    return [result if isinstance(result, bytes) else None for result in results], failed


def _item(items: Sequence[Item | None], position: int) -> Item:
    item = items[position]
    assert item is not None
    return item
