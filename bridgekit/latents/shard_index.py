"""Index from content hashes to shards and rows, at 32 bytes per item; a dictionary takes 190."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class ShardIndex:
    """Maps content hashes to shards and rows. If several shards have the same content, the last one added wins.

    A run adds a shard every few seconds without looking any up, so the sorted lookup table is built on first use.
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

    def clear(self) -> None:
        """Remove all shards."""
        self.__init__()  # type: ignore[misc]

    def __len__(self) -> int:
        """The number of distinct contents."""
        hashes, _, _ = self._lookup()
        return len(np.unique(hashes))

    def __iter__(self) -> Iterator[bytes]:
        hashes, _, _ = self._lookup()
        return (digest.ljust(hashes.itemsize, b"\0") for digest in np.unique(hashes).tolist())

    def __contains__(self, digest: bytes) -> bool:
        return self._place(digest) is not None

    def __getitem__(self, digest: bytes) -> tuple[Path, int]:
        place = self._place(digest)
        if place is None:
            raise KeyError(digest)
        _, _, starts = self._lookup()
        shard = int(np.searchsorted(starts, place, side="right")) - 1
        return self._paths[shard], place - int(starts[shard])

    def _place(self, digest: bytes) -> int | None:
        """The row in the concatenation of all shards, in the order they were added; None if absent."""
        hashes, order, _ = self._lookup()
        at = int(np.searchsorted(hashes, np.bytes_(digest), side="right")) - 1
        return int(order[at]) if at >= 0 and hashes[at] == digest.rstrip(b"\0") else None

    def _lookup(self) -> tuple[NDArray[np.bytes_], NDArray[np.int64], NDArray[np.int64]]:
        if self._sorted is None:
            every = np.concatenate(self._hashes) if self._hashes else np.zeros(0, "S1")
            order = np.argsort(every, kind="stable")
            starts = np.cumsum([0, *(len(hashes) for hashes in self._hashes[:-1])])
            self._sorted = every[order], order, starts
        return self._sorted
