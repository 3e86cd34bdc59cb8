"""The latent store: every item encoded once, ever. Safetensors shards, keyed by encoder revision and content hash."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridgekit.cache import cache_folder, write_atomically
from bridgekit.encoders import Encoder, Item
from bridgekit.errors import BridgekitError, ItemError, PluginError
from bridgekit.media import content_hash, size_hint
from bridgekit.plugins import plugin_of

#: Items in one forward pass. A killed run loses at most one such batch.
BATCH_SIZE = 32
#: Batches whose items are decoded ahead of the encoder.
AHEAD = 4
#: Shards with fewer rows than this are merged when a run ends.
SMALL_SHARD = 4_096

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Latents:
    """The latents of a list of items.

    Arguments:
        matrix: (m, d) float32, one row per distinct content.
        ids: (n,) each item's row of `matrix`; -1 for a hole or an item that failed.
        failed: position in the list to the reason, for items that could not be used.
        encoded: how many rows were encoded now rather than read from the store.
        fingerprint: a hash over encoder revision and contents, in order.
    """

    matrix: Tensor
    ids: NDArray[np.int64]
    failed: Mapping[int, str]
    encoded: int
    fingerprint: str


class LatentStore:
    """The latents of one encoder revision on disk.

    Arguments:
        revision: the encoder's.
        dim: the latents' width.
        folder: the cache; the default is `cache_folder() / "latents"`.

    A shard is written aside and renamed, so it is whole or absent. Two processes may use one store: at worst both encode
    an item and it is kept twice.
    """

    def __init__(self, revision: str, dim: int, folder: Path | None = None) -> None:
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", revision)[:60].strip("-.")
        self.revision, self.dim = revision, dim
        self.folder = (folder or cache_folder() / "latents") / f"{slug}-{hashlib.sha256(revision.encode()).hexdigest()[:12]}"
        self._where: dict[bytes, tuple[Path, int]] = {}
        self._shards: dict[Path, int] = {}
        if self.folder.is_dir():
            for path in sorted(self.folder.glob("*.safetensors")):
                self._index(path)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, "numpy") as file:
                digests = file.get_tensor("digests")
                shape = file.get_slice("latents").get_shape()
        except (SafetensorError, OSError):
            return  # damaged, or merged away by another process: its items are encoded again
        if shape != [len(digests), self.dim]:
            return
        self._shards[path] = len(digests)
        for row, digest in enumerate(digests):
            self._where[digest.tobytes()] = (path, row)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._where

    def read(self, digests: Sequence[bytes]) -> Tensor:
        """Latents of stored contents, (len(digests), dim), memory-mapped and copied once."""
        out = torch.empty(len(digests), self.dim)
        by_shard: dict[Path, tuple[list[int], list[int]]] = {}
        for position, digest in enumerate(digests):
            path, row = self._where[digest]
            positions, rows = by_shard.setdefault(path, ([], []))
            positions.append(position)
            rows.append(row)
        for path, (positions, rows) in by_shard.items():
            with safe_open(path, "pt") as file:
                out[positions] = file.get_tensor("latents")[rows]
        return out

    def write(self, digests: Sequence[bytes], latents: Tensor) -> None:
        """Keep latents of shape (len(digests), dim). They are on the disk when this returns."""
        path = self.folder / f"{uuid4().hex}.safetensors"
        table = torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), -1).copy())
        tensors = {"latents": latents.contiguous(), "digests": table}
        write_atomically(path, lambda aside: save_file(tensors, aside, {"format": "1", "revision": self.revision}))
        self._index(path)

    def merge_small_shards(self) -> None:
        """Turn the many shards of a run, one a batch, into one."""
        small = {path for path, rows in self._shards.items() if rows < SMALL_SHARD}
        if len(small) < 8:
            return
        digests = [digest for digest, (path, _) in self._where.items() if path in small]
        self.write(digests, self.read(digests))
        for path in small:
            del self._shards[path]
            path.unlink(missing_ok=True)


def encode_items(
    encoder: Encoder, items: Sequence[Item | None], *, progress: Progress = lambda done, total: None, folder: Path | None = None
) -> Latents:
    """The latents of items, from the store where they are there, encoded and stored where they are not.

    Arguments:
        encoder: an opened encoder.
        items: paths or texts; None is a hole.
        progress: called with (done, total) of the items to encode.
        folder: the latent store's folder, for tests.

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
    plan = sorted(first_position, key=lambda digest: (sizes[digest], digest))
    batches = [plan[start : start + BATCH_SIZE] for start in range(0, len(plan), BATCH_SIZE)]
    batches = [[digest for digest in batch if digest not in store] for batch in batches]
    batches = [batch for batch in batches if batch]
    total = sum(map(len, batches))

    reasons: dict[bytes, str] = {}
    done = encoded = 0
    if total:
        progress(0, total)
    for batch, prepared in _prepare_ahead(encoder, batches, lambda digest: _item(items, first_position[digest])):
        good = [(digest, value) for digest, value in zip(batch, prepared, strict=True) if not isinstance(value, Exception)]
        reasons |= {
            digest: _reason(value, encoder)
            for digest, value in zip(batch, prepared, strict=True)
            if isinstance(value, Exception)
        }
        if good:
            latents = _encode(encoder, [value for _, value in good])
            finite = latents.isfinite().all(1)
            kept = [digest for (digest, _), fine in zip(good, finite.tolist(), strict=True) if fine]
            spoiled = f"its latents are not finite numbers ({plugin_of(encoder)} gave NaN or infinity)"
            reasons |= {digest: spoiled for digest, _ in good if digest not in set(kept)}
            if kept:
                store.write(kept, latents[finite])
            encoded += len(kept)
        done += len(batch)
        progress(done, total)
    if encoded:
        store.merge_small_shards()

    usable = [digest for digest in first_position if digest not in reasons]
    row_of = {digest: row for row, digest in enumerate(usable)}
    ids = np.array([row_of.get(digest, -1) if digest else -1 for digest in digests], dtype=np.int64)
    failed |= {position: reasons[digest] for position, digest in enumerate(digests) if digest in reasons}
    whole = hashlib.sha256(encoder.revision.encode() + b"".join(digest or b"-" for digest in digests))
    return Latents(store.read(usable), ids, failed, encoded, whole.hexdigest())


def _hash_all(items: Sequence[Item | None]) -> tuple[list[bytes | None], dict[int, str]]:
    """Content hashes, None for holes and missing files, and the reasons of the latter."""

    def one(item: Item | None) -> bytes | ItemError | None:
        try:
            return None if item is None else content_hash(item)
        except ItemError as error:
            return error

    with ThreadPoolExecutor(_threads()) as pool:
        results = list(pool.map(one, items, chunksize=64))
    failed = {position: _reason(result) for position, result in enumerate(results) if isinstance(result, ItemError)}
    return [result if isinstance(result, bytes) else None for result in results], failed


def _prepare_ahead(
    encoder: Encoder, batches: Sequence[Sequence[bytes]], item_of: Callable[[bytes], Item]
) -> Iterator[tuple[Sequence[bytes], list[Any]]]:
    """Each batch with its prepared items, or the exception an item raised, while the next batches are being prepared."""

    def prepare(item: Item) -> Any:
        try:
            return encoder.prepare(item)
        except Exception as error:  # a decoder may raise anything; it costs one item
            return error

    with ThreadPoolExecutor(_threads()) as pool:

        def submit(batch: Sequence[bytes]) -> tuple[Sequence[bytes], list[Future[Any]]]:
            return batch, [pool.submit(prepare, item_of(digest)) for digest in batch]

        remaining = iter(batches)
        waiting = [submit(batch) for batch in islice(remaining, AHEAD)]
        try:
            while waiting:
                batch, futures = waiting.pop(0)
                values = [future.result() for future in futures]
                waiting += [submit(following) for following in islice(remaining, 1)]
                yield batch, values
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _encode(encoder: Encoder, inputs: list[Any]) -> Tensor:
    try:
        with torch.inference_mode():
            latents = encoder.encode(inputs)
    except BridgekitError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"{plugin_of(encoder)} failed to encode: {reason}",
            where=encoder.revision,
            remedy="report it to the plugin's author",
        ) from error
    if not isinstance(latents, Tensor) or latents.shape != (len(inputs), encoder.dim):
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise PluginError(
            f"{plugin_of(encoder)} returned {shape} for {len(inputs)} items; its contract is {(len(inputs), encoder.dim)}",
            where=encoder.revision,
            remedy="report it to the plugin's author",
        )
    return latents.detach().float().cpu()


def _item(items: Sequence[Item | None], position: int) -> Item:
    item = items[position]
    assert item is not None
    return item


def _reason(error: Exception, encoder: Encoder | None = None) -> str:
    """Why an item cannot be used. What is no ItemError is the plugin's own mistake, not the item's."""
    if isinstance(error, BridgekitError):
        return error.what
    return (f"{plugin_of(encoder)} failed on it: " if encoder else "") + f"{type(error).__name__}: {error}"


def _threads() -> int:
    return min(8, os.cpu_count() or 1)
