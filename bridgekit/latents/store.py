"""The latent store, so that each item is encoded only once: safetensors shards, keyed by encoder revision and content hash."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bridgekit.errors import BridgekitError
from bridgekit.hardware import HALF, free_memory
from bridgekit.latents.batches import FLOAT32, Precision
from bridgekit.progress import say
from bridgekit.storage.cache import cache_folder
from bridgekit.storage.locks import locked
from bridgekit.storage.sealed import DamagedFile, read_sealed, write_sealed

#: Shard format. Shards of other versions, including the first, which had no checksums, are ignored.
FORMAT = "2"
#: Shards with fewer rows than this are small: at the end of a run,
SMALL_SHARD = 4_096
#: this many or more of them are merged
MANY_AFTER = 8
#: into shards of about this many rows.
MERGED_ROWS = 32_768


class LatentsVanished(BridgekitError):
    """Stored latents were removed or are damaged, and must be encoded again."""


@dataclass(frozen=True)
class Latents:
    """The latents of a list of items.

    Arguments:
        matrix: (m, d) float32, or float16 if half precision was asked for; one row per distinct content.
        ids: (n,) each item's row of `matrix`; -1 if it is missing or failed.
        failed: position in the list to error message, for items that could not be used.
        encoded: how many rows were encoded in this call rather than read from the store.
        fingerprint: a hash over encoder revision and contents, in order.
        precision: the precision of those encoded in this call.
        seconds: how long encoding them took.
        folder: where they are stored.
        contents: m content hashes, one per row of `matrix`.
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
    """Metadata of a shard: (n, 32) content hashes, and the precision of its latents."""

    digests: NDArray[np.uint8]
    precision: Precision


class ShardIndex:
    """Maps content hashes to shards and rows, at 32 bytes per item; a dictionary takes 190.

    If several shards have the same content, the last one added wins. A run adds a shard every few seconds without looking
    anything up, so the sorted lookup table is built on first use.
    """

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._hashes: list[NDArray[np.bytes_]] = []
        self._sorted: tuple[NDArray[np.bytes_], NDArray[np.int64], NDArray[np.int64]] | None = None

    def add(self, path: Path, digests: NDArray[np.uint8]) -> None:
        """Add a shard with its (n, 32) content hashes."""
        self._paths.append(path)
        # NumPy ignores trailing zeros when comparing bytes, but hashes of equal length still compare correctly.
        self._hashes.append(np.ascontiguousarray(digests).view(f"S{digests.shape[1]}")[:, 0])
        self._sorted = None

    def get(self, digest: bytes) -> tuple[Path, int] | None:
        """The shard and row of a content; None if it is in no shard."""
        if self._sorted is None:
            every = np.concatenate(self._hashes) if self._hashes else np.zeros(0, "S1")
            order = np.argsort(every, kind="stable")
            self._sorted = every[order], order, np.cumsum([0, *map(len, self._hashes[:-1])])
        hashes, order, starts = self._sorted
        at = int(np.searchsorted(hashes, np.bytes_(digest), side="right")) - 1
        if at < 0 or hashes[at] != digest.rstrip(b"\0"):
            return None
        place = int(order[at])  # the row in the concatenation of all shards
        shard = int(np.searchsorted(starts, place, side="right")) - 1
        return self._paths[shard], place - int(starts[shard])


class LatentStore:
    """The latents, of width `dim`, of one encoder revision on disk, by default in `cache_folder() / "latents"`.

    Shards are written atomically, and their checksum is verified before latents are used. Several processes may share a store;
    at worst, two of them encode and store the same item.
    """

    def __init__(self, revision: str, dim: int, folder: Path | None = None) -> None:
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", revision)[:60].strip("-.")
        self.revision, self.dim = revision, dim
        self.folder = (folder or cache_folder() / "latents") / f"{slug}-{hashlib.sha256(revision.encode()).hexdigest()[:12]}"
        self._damaged: set[Path] = set()
        self._find_shards()

    def _find_shards(self) -> None:
        self._where = ShardIndex()
        self._shards: dict[Path, _Shard] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._damaged:
                self._index(path)

    def _index(self, path: Path) -> None:
        """Read a shard's metadata. Its checksum is verified later, since most runs need only a few shards."""
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    return  # another version: neither read nor modified
                digests = file.get_tensor("digests")
                if digests.shape[1:] != (32,) or file.get_slice("latents").get_shape() != [len(digests), self.dim]:
                    raise SafetensorError("its tensors have the wrong shape")
            agreement = float(metadata["agreement"]) if "agreement" in metadata else None
        except OSError:
            return  # merged by another process, or no permission
        except (SafetensorError, ValueError):
            self._discard(path)
            return
        self._shards[path] = _Shard(digests, Precision(metadata.get("products", FLOAT32.products), agreement))
        self._where.add(path, digests)

    def _discard(self, path: Path) -> None:
        """Remove a damaged shard, so that its items are encoded again."""
        self._damaged.add(path)
        with suppress(OSError):  # if it cannot be removed, it is skipped
            path.unlink()
            say(f"removed damaged latents ({path}); missing items will be encoded again")

    def __contains__(self, digest: bytes) -> bool:
        return self._where.get(digest) is not None

    @property
    def digests(self) -> NDArray[np.uint8]:
        """The (n, 32) content hashes of all stored latents, possibly with repetitions."""
        return np.concatenate([np.zeros((0, 32), np.uint8), *(shard.digests for shard in self._shards.values())])

    def read(self, digests: Sequence[bytes], half: bool = False) -> Tensor:
        """Latents of stored contents, (len(digests), dim). If they would take over half of the free memory, a memory map.

        Arguments:
            digests: the contents.
            half: as float16 instead of float32.

        Raises:
            LatentsVanished: latents were removed meanwhile, or a shard is damaged.
            BridgekitError: there is not enough disk space for the memory map, or a latent is too large for float16.
        """
        out = _block(len(digests), self.dim, self.folder, HALF if half else torch.float32)
        for _ in range(2):  # another process may have merged shards, and damaged latents may have an intact copy
            try:
                self._read(digests, out)
                return out
            except (SafetensorError, FileNotFoundError, DamagedFile, KeyError):
                self._find_shards()
        raise LatentsVanished(
            "latents disappeared while being read",
            where=str(self.folder),
            remedy="run the same command again: it encodes what is missing",
        )

    def _read(self, digests: Sequence[bytes], out: Tensor) -> None:
        by_shard: dict[Path, tuple[list[int], list[int]]] = {}
        for position, digest in enumerate(digests):
            found = self._where.get(digest)
            if found is None:
                raise KeyError(digest)
            path, row = found
            positions, rows = by_shard.setdefault(path, ([], []))
            positions.append(position)
            rows.append(row)
        damaged = 0
        for path, (positions, rows) in by_shard.items():
            try:
                latents = _verified_latents(path)[rows]
                if out.dtype == HALF and len(latents) and latents.abs().max() > torch.finfo(HALF).max:
                    raise BridgekitError(
                        "latents are too large for half precision",
                        where=str(self.folder),
                        remedy="omit --half (in Python: half)",
                    )
                out[positions] = latents.to(out.dtype)
            except (DamagedFile, SafetensorError):
                damaged += 1
                self._discard(path)
        if damaged:
            raise DamagedFile

    def write(self, digests: Sequence[bytes], latents: Tensor, precision: Precision = FLOAT32) -> None:
        """Store latents of shape (len(digests), dim). They are on disk when this returns.

        Raises:
            BridgekitError: they cannot be written.
        """
        path = self.folder / f"{uuid4().hex}.safetensors"
        table = torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), -1).copy())
        metadata = {"format": FORMAT, "revision": self.revision, "products": precision.products}
        if precision.agreement is not None:
            metadata["agreement"] = repr(precision.agreement)
        write_sealed(path, {"latents": latents, "digests": table}, metadata)
        self._index(path)

    def merge_small_shards(self, many: int = MANY_AFTER) -> None:
        """Merge the small shards of each precision if there are `many`: a run writes one every few seconds.

        This is only an optimisation: it is skipped if another process is merging, the disk is full or a shard is damaged.
        """
        if max(map(len, self._small().values()), default=0) < many:
            return
        with suppress(OSError, BridgekitError), locked(self.folder / ".merging.lock") as alone:
            if alone:
                self._find_shards()  # another process may just have merged some of them
                for products, paths in self._small().items():
                    if len(paths) >= many:
                        self._merge(paths, products)

    def _small(self) -> dict[str, list[Path]]:
        """The small shards of each precision."""
        small: dict[str, list[Path]] = {}
        for path, shard in self._shards.items():
            if len(shard.digests) < SMALL_SHARD:
                small.setdefault(shard.precision.products, []).append(path)
        return small

    def _merge(self, paths: Sequence[Path], products: str) -> None:
        rows = np.cumsum([len(self._shards[path].digests) for path in paths])
        for number in range(int(rows[-1]) // MERGED_ROWS + 1):  # in chunks, to limit memory
            part = [path for path, end in zip(paths, rows, strict=True) if end // MERGED_ROWS == number]
            digests = list(dict.fromkeys(digest.tobytes() for path in part for digest in self._shards[path].digests))
            # Contents whose latest copy is in another shard are read too, to verify it before these copies are removed.
            latents = self.read(digests)
            own = [row for row, digest in enumerate(digests) if (found := self._where.get(digest)) and found[0] in part]
            agreements = [agreement for path in part if (agreement := self._shards[path].precision.agreement) is not None]
            if own:
                precision = Precision(products, min(agreements, default=None))
                self.write([digests[row] for row in own], latents[own], precision)
            for path in part:
                self._shards.pop(path)
                path.unlink(missing_ok=True)


#: Path, modification time and size of the shards whose checksum this process has verified.
_verified: set[tuple[Path, int, int]] = set()


def _verified_latents(path: Path) -> Tensor:
    """The latents of a shard, whose checksum is verified once per process: raises what `read_sealed` raises."""
    status = path.stat()
    key = path, status.st_mtime_ns, status.st_size
    if key not in _verified:
        latents = read_sealed(path)[0]["latents"]
        _verified.add(key)
        return latents
    with safe_open(path, "pt") as file:
        return cast(Tensor, file.get_tensor("latents"))


def _block(rows: int, width: int, folder: Path, kind: torch.dtype) -> Tensor:
    """An uninitialised matrix: in memory, or, if it exceeds half of the free memory, in an unnamed file."""
    size = kind.itemsize * rows * width
    if size <= free_memory() / 2:
        return torch.empty(rows, width, dtype=kind)
    try:
        # Unnamed, so that nothing is left behind however the process ends.
        with tempfile.TemporaryFile(dir=folder) as file:
            # Allocate everything now: on a full disk, writing to a sparse memory map would kill the process.
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_numpy(np.memmap(file, np.float16 if kind == HALF else np.float32, "r+", shape=(rows, width)))
    except OSError as error:
        raise BridgekitError(
            f"{size / 1e9:.1f} GB of latents fit neither in memory nor on disk ({error.strerror})",
            where=str(folder),
            remedy="free some space, or set BRIDGEKIT_HOME to a folder on a larger disk",
        ) from None
