"""Which shard and row holds the latents of a content: 32 bytes an item, where a dictionary takes 190."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class ShardIndex:
    """From content hashes to shards and rows. Of a content that stands in several shards, the one added last counts.

    A run adds a shard every few seconds and looks none up meanwhile: what lookups need is made when the first one comes.
    """

    def __init__(self) -> None:
        self._paths: list[Path] = []
        self._hashes: list[NDArray[np.bytes_]] = []
        self._sorted: tuple[NDArray[np.bytes_], NDArray[np.int64], NDArray[np.int64]] | None = None

    def add(self, path: Path, digests: NDArray[np.uint8]) -> None:
        """Add a shard with its (n, 32) content hashes."""
        self._paths.append(path)
        # Compared as bytes; that NumPy takes no account of zeros at their end makes no two of one length equal.
        self._hashes.append(np.ascontiguousarray(digests).view(f"S{digests.shape[1]}")[:, 0])
        self._sorted = None

    def clear(self) -> None:
        """Forget all shards."""
        self.__init__()  # type: ignore[misc]

    def __len__(self) -> int:
        """How many different contents there are."""
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
        """Which of all rows of all shards, in the order in which they were added."""
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
