"""The latent store: every item encoded once, ever. Safetensors shards, keyed by encoder revision and content hash."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bridgekit.errors import BridgekitError
from bridgekit.hardware import free_memory
from bridgekit.latents.batches import (
    FLOAT32,
    Precision,
)
from bridgekit.latents.shard_index import ShardIndex
from bridgekit.progress import say
from bridgekit.storage.cache import cache_folder
from bridgekit.storage.locks import locked
from bridgekit.storage.sealed import DamagedFile, read_sealed, write_sealed

#: Of shards. A later version may write another, which is left alone, as are those of before there were checksums.
FORMAT = "2"
#: Shards with fewer rows than this are merged, where there are so many of them while a run goes on, or at its end.
SMALL_SHARD = 4_096
MANY_AFTER = 8
#: Rows, about, that they are merged to.
MERGED_ROWS = 32_768


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


def _block(rows: int, width: int, folder: Path) -> Tensor:
    """A float32 matrix to be filled: in memory or, where it would take more than half of what is free, in an unnamed file."""
    size = 4 * rows * width
    if size <= free_memory() / 2:
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
