"""The latent store: every item encoded once, ever. Safetensors shards, keyed by encoder revision and content hash."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bridgekit.batches import (
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
    threads,
)
from bridgekit.bounded import parse_json, read_bounded
from bridgekit.cache import cache_folder, check_writable, write_text_atomically
from bridgekit.encoders import Encoder, Item
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.locks import locked
from bridgekit.media import content_hash, size_hint
from bridgekit.progress import say
from bridgekit.sealed import DamagedFile, read_sealed, write_sealed
from bridgekit.shard_index import ShardIndex

#: Of shards. A later version may write another, which is left alone, as are those of before there were checksums.
FORMAT = "2"
#: Seconds of work, and rows, that a killed run may lose: latents wait so long for others to be written with.
FLUSH_SECONDS = 2.0
FLUSH_ROWS = 8_192
#: Shards with fewer rows than this are merged, where there are so many of them while a run goes on, or at its end.
SMALL_SHARD = 4_096
MANY_DURING = 64
MANY_AFTER = 8
#: Rows, about, that they are merged to.
MERGED_ROWS = 32_768
#: How often what has vanished from the store is encoded again, in one run.
ROUNDS = 3

Progress = Callable[[int, int], object]


class LatentsVanished(BridgekitError):
    """Latents that were there are no longer, or are damaged: what is missing has to be encoded again."""


@dataclass(frozen=True)
class Latents:
    """The latents of a list of items.

    Arguments:
        matrix: (m, d) float32, one row per distinct content.
        ids: (n,) each item's row of `matrix`; -1 for a hole or an item that failed.
        failed: position in the list to the reason, for items that could not be used.
        encoded: how many rows were encoded now rather than read from the store.
        fingerprint: a hash over encoder revision and contents, in order.
        precision: what those encoded now were computed in.
        seconds: how long encoding them took.
        folder: where they are kept.
        contents: m content hashes: what each row of `matrix` is the latents of.
    """

    matrix: Tensor
    ids: NDArray[np.int64]
    failed: Mapping[int, str]
    encoded: int
    fingerprint: str
    precision: Precision
    seconds: float
    folder: Path
    contents: Sequence[bytes]


@dataclass(frozen=True)
class _Shard:
    """What is known of a shard: (n, 32) the hashes of its contents, and what its latents were computed in."""

    digests: NDArray[np.uint8]
    precision: Precision


class LatentStore:
    """The latents of one encoder revision on disk.

    Arguments:
        revision: the encoder's.
        dim: the latents' width.
        folder: the cache; the default is `cache_folder() / "latents"`.

    A shard is written aside and renamed, so it is whole or absent, and carries a checksum, which is looked at when its latents
    are read: damaged ones are never served. Two processes may use one store: at worst both encode an item and it is kept twice.
    """

    def __init__(self, revision: str, dim: int, folder: Path | None = None) -> None:
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", revision)[:60].strip("-.")
        self.revision, self.dim = revision, dim
        self.folder = (folder or cache_folder() / "latents") / f"{slug}-{hashlib.sha256(revision.encode()).hexdigest()[:12]}"
        self._where = ShardIndex()
        self._shards: dict[Path, _Shard] = {}
        self._damaged: set[Path] = set()
        self._find_shards()

    def _find_shards(self) -> None:
        self._where.clear()
        self._shards.clear()
        if self.folder.is_dir():
            for path in sorted(self.folder.glob("*.safetensors")):
                if path not in self._damaged:
                    self._index(path)

    def _index(self, path: Path) -> None:
        """Learn what a shard holds. Its checksum is not looked at yet: most runs need few shards of many."""
        try:
            with safe_open(path, "numpy") as file:
                told = file.metadata() or {}
                if told.get("format") != FORMAT:
                    return  # of another version: neither read nor touched
                digests = file.get_tensor("digests")
                if digests.shape[1:] != (32,) or file.get_slice("latents").get_shape() != [len(digests), self.dim]:
                    raise SafetensorError("its tensors have another shape")
            agreement = float(told["agreement"]) if "agreement" in told else None
        except OSError:
            return  # merged away by another process, or not for us to read
        except (SafetensorError, ValueError):
            self._put_away(path)
            return
        self._shards[path] = _Shard(digests, Precision(told.get("products", FLOAT32.products), agreement))
        self._where.add(path, digests)

    def _put_away(self, path: Path) -> None:
        """Remove a damaged shard: its items are encoded again."""
        self._damaged.add(path)
        with suppress(OSError):  # where it cannot be removed, it is passed over
            path.unlink()
            say(f"latents in {path} were damaged: they are not used, and what lacks is encoded again")

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._where

    def read(self, digests: Sequence[bytes]) -> Tensor:
        """Latents of stored contents, (len(digests), dim): one block, in a file mapped to memory where half of it would not do.

        Raises:
            LatentsVanished: the store was emptied meanwhile, or a shard is damaged.
            BridgekitError: the disk has no room for that file.
        """
        out = _block(len(digests), self.dim, self.folder)
        for _ in range(2):  # another process may have merged some shards, and of damaged latents there may be others
            try:
                self._read(digests, out)
                return out
            except (SafetensorError, FileNotFoundError, DamagedFile, KeyError):
                self._find_shards()
        raise LatentsVanished(
            "latents vanished while they were read",
            where=str(self.folder),
            remedy="run the same command again: it encodes what is missing",
        )

    def _read(self, digests: Sequence[bytes], out: Tensor) -> None:
        by_shard: dict[Path, tuple[list[int], list[int]]] = {}
        for position, digest in enumerate(digests):
            path, row = self._where[digest]
            positions, rows = by_shard.setdefault(path, ([], []))
            positions.append(position)
            rows.append(row)
        damaged = 0
        for path, (positions, rows) in by_shard.items():
            try:
                out[positions] = _sound_latents(path)[rows]
            except (DamagedFile, SafetensorError):
                damaged += 1
                self._put_away(path)
        if damaged:
            raise DamagedFile

    def write(self, digests: Sequence[bytes], latents: Tensor, precision: Precision = FLOAT32) -> None:
        """Keep latents of shape (len(digests), dim). They are on the disk when this returns.

        Raises:
            BridgekitError: they cannot be written.
        """
        path = self.folder / f"{uuid4().hex}.safetensors"
        table = torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), -1).copy())
        told = {"format": FORMAT, "revision": self.revision, "products": precision.products}
        if precision.agreement is not None:
            told["agreement"] = repr(precision.agreement)
        write_sealed(path, {"latents": latents, "digests": table}, told)
        self._index(path)

    def merge_small_shards(self, many: int = MANY_AFTER) -> None:
        """Turn the small shards of a run, one for every few seconds, into larger ones. What was computed otherwise stays apart.

        Nothing depends on it: where another process is at it, the disk is full or a shard is damaged, it is left for later.

        Arguments:
            many: fewer than this are left alone.
        """
        if max(map(len, self._small().values()), default=0) < many:
            return
        with suppress(OSError, BridgekitError), locked(self.folder / ".merging.lock") as alone:
            if alone:
                self._find_shards()  # another process may have merged some of them just now
                for products, paths in self._small().items():
                    if len(paths) >= many:
                        self._merge(paths, products)

    def _small(self) -> dict[str, list[Path]]:
        """The small shards, by what they were computed in."""
        small: dict[str, list[Path]] = {}
        for path, shard in self._shards.items():
            if len(shard.digests) < SMALL_SHARD:
                small.setdefault(shard.precision.products, []).append(path)
        return small

    def _merge(self, paths: Sequence[Path], products: str) -> None:
        rows = np.cumsum([len(self._shards[path].digests) for path in paths])
        for number in range(int(rows[-1]) // MERGED_ROWS + 1):  # by so many, for they go through memory
            part = [path for path, end in zip(paths, rows, strict=True) if end // MERGED_ROWS == number]
            every = dict.fromkeys(digest.tobytes() for path in part for digest in self._shards[path].digests)
            # Those that are kept elsewhere are read too: nothing is removed before its other copy was seen to be sound.
            latents = self.read(list(every))
            own = [row for row, digest in enumerate(every) if self._where[digest][0] in part]
            agreements = [agreement for path in part if (agreement := self._shards[path].precision.agreement) is not None]
            if own:
                digests = list(every)
                precision = Precision(products, min(agreements, default=None))
                self.write([digests[row] for row in own], latents[own], precision)
            for path in part:
                self._shards.pop(path)
                path.unlink(missing_ok=True)


#: Shards whose checksum this process has found right, with their times and sizes then.
_sound: set[tuple[Path, int, int]] = set()


def _sound_latents(path: Path) -> Tensor:
    """The latents of a shard whose checksum is right; that is looked at once a process.

    Raises:
        DamagedFile: it is not.
        FileNotFoundError: there is no such shard any more.
    """
    status = path.stat()
    seen = path, status.st_mtime_ns, status.st_size
    if seen in _sound:
        with safe_open(path, "pt") as file:
            latents: Tensor = file.get_tensor("latents")
        return latents
    latents = read_sealed(path)[0]["latents"]
    _sound.add(seen)
    return latents


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
    `bridgekit.batches.check_precision`.

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


def _block(rows: int, width: int, folder: Path) -> Tensor:
    """A float32 matrix to be filled: in memory or, where it would take more than half of what is free, in an unnamed file."""
    size = 4 * rows * width
    if size <= _free_memory() / 2:
        return torch.empty(rows, width)
    try:
        # It has no name: nothing is left of it, however the process ends.
        with tempfile.TemporaryFile(dir=folder) as file:
            # All of it at once: where a disk is full, writing into a file with holes through memory would kill the process.
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(rows, width)))
    except OSError as error:
        raise BridgekitError(
            f"there is no room for {size / 1e9:.1f} GB of latents, neither in memory nor on the disk ({error.strerror})",
            where=str(folder),
            remedy="free some, or let $BRIDGEKIT_HOME name a folder on a larger disk",
        ) from None


def _free_memory() -> float:
    """Bytes of memory that are free, or that a container may use at all if that is less; infinite where nothing tells."""
    free = math.inf
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError):  # the word `max` where there is no limit
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return free


def _item(items: Sequence[Item | None], position: int) -> Item:
    item = items[position]
    assert item is not None
    return item
