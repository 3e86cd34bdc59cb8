"""Which rows a bridge was trained on, by what they hold: an evaluation can then tell that it asks one of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.storage.bounded import open_regular

#: Of 268 million marks.
MAX_BYTES = 2 << 30
#: Lies in a bridge's folder.
FILE = "training_rows.safetensors"

#: Modality to (n,) indices into its contents, negative for a hole; and modality to content hashes (`media.content_hash`).
Ids = Mapping[str, NDArray[np.int64]]
Contents = Mapping[str, Sequence[bytes]]


@dataclass(frozen=True)
class TrainingRows:
    """The rows that a bridge was trained on and those that chose its epoch, a few marks each: 16 bytes for two modalities.

    Arguments:
        marks: (m,) sorted 64-bit hashes of what stands together in a row: all its items, and any of them but texts alone,
            which repeat in rows that have nothing to do with each other. Two rows share one by chance once in 10^19 pairs.
    """

    marks: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, ids: Ids, contents: Contents, rows: NDArray[np.int64]) -> TrainingRows:
        """The marks of some rows of a table."""
        found = b"".join(
            _mark(part)
            for row in rows.tolist()
            for items in [_items(ids, contents, row)]
            for size in range(1, len(items) + 1)
            for part in combinations(items, size)
            if any(modality != TEXT for modality, _ in part)
        )
        return cls(np.unique(np.frombuffer(found, np.int64)))

    def __bool__(self) -> bool:
        """Whether they are known: bridges of older versions do not tell."""
        return len(self.marks) > 0

    def __or__(self, other: TrainingRows) -> TrainingRows:
        return TrainingRows(np.union1d(self.marks, other.marks))

    def whole(self, ids: Ids, contents: Contents) -> NDArray[np.bool_]:
        """(n,) whether all items of a row stand together in one of these."""
        return self._has([_items(ids, contents, row) for row in range(_count(ids))])

    def files(self, ids: Ids, contents: Contents) -> NDArray[np.bool_]:
        """(n,) whether all items of a row but its text stand together in one of these."""
        return self.whole({modality: each for modality, each in ids.items() if modality != TEXT}, contents)

    def _has(self, rows: Sequence[Sequence[tuple[str, bytes]]]) -> NDArray[np.bool_]:
        marks = np.frombuffer(b"".join(_mark(items) for items in rows), np.int64)
        there = np.array([len(items) > 0 for items in rows], bool)
        return np.asarray(np.isin(marks, self.marks) & there, np.bool_)

    def save(self, folder: Path) -> None:
        """Write them into a bridge's folder that is being made."""
        if self:
            data = self.marks.astype("<i8")
            told = {"sha256": hashlib.sha256(data.tobytes()).hexdigest()}
            (folder / FILE).write_bytes(save({"marks": data}, told))

    @classmethod
    def load(cls, folder: Path) -> TrainingRows:
        """Those of a bridge's folder; none where it does not tell.

        Raises:
            BridgekitError: the file is not what was written.
        """
        file = folder / FILE
        try:
            with open_regular(file) as opened_file:  # a pipe would be waited for without end
                if os.fstat(opened_file.fileno()).st_size > MAX_BYTES:
                    raise ValueError("it is larger than any table's could be")
            with safe_open(file, "numpy") as opened:
                marks: NDArray[np.int64] = opened.get_tensor("marks")
                told = (opened.metadata() or {}).get("sha256")
            if marks.dtype != np.int64 or hashlib.sha256(marks.tobytes()).hexdigest() != told:
                raise ValueError("its checksum is another")
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise BridgekitError(
                f"this bridge is damaged: {FILE} cannot be read ({error})",
                where=str(folder),
                remedy="copy it again, or train it again",
            ) from None
        return cls(marks.reshape(-1))


def _count(ids: Ids) -> int:
    return len(next(iter(ids.values()), ()))


def _items(ids: Ids, contents: Contents, row: int) -> list[tuple[str, bytes]]:
    """The items of a row, by modality, in an order that is the same in every table."""
    return [(modality, contents[modality][ids[modality][row]]) for modality in sorted(ids) if ids[modality][row] >= 0]


def _mark(items: Sequence[tuple[str, bytes]]) -> bytes:
    whole = b"".join(modality.encode() + b"\0" + content for modality, content in items)
    return hashlib.blake2b(whole, digest_size=8).digest()
