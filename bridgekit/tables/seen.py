"""Fingerprints of the rows a bridge was trained on, so that an evaluation can detect them."""

from __future__ import annotations

import hashlib
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
from bridgekit.storage.bounded import regular_size

#: Maximum size of the file: 268 million marks.
MAX_BYTES = 2 << 30
#: File in a bridge's folder.
FILE = "training_rows.safetensors"

#: Modality to (n,) indices into its contents, negative if missing; and modality to content hashes (`media.content_hash`).
Ids = Mapping[str, NDArray[np.int64]]
Contents = Mapping[str, Sequence[bytes]]


@dataclass(frozen=True)
class TrainingRows:
    """Hashes of the rows used for training and validation: 16 bytes per row with two modalities.

    Arguments:
        marks: (m,) sorted 64-bit hashes of every combination of a row's items, except texts alone, which repeat in unrelated
            rows. The chance that two rows share one is about 1 in 10^19.
    """

    marks: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, ids: Ids, contents: Contents, rows: NDArray[np.int64]) -> TrainingRows:
        """The marks of these rows of a table."""
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
        """Whether they are known: older bridges did not record them."""
        return len(self.marks) > 0

    def __or__(self, other: TrainingRows) -> TrainingRows:
        return TrainingRows(np.union1d(self.marks, other.marks))

    def whole(self, ids: Ids, contents: Contents) -> NDArray[np.bool_]:
        """(n,) whether a training row contains all items of each row."""
        rows = [_items(ids, contents, row) for row in range(len(next(iter(ids.values()), ())))]
        marks = np.frombuffer(b"".join(map(_mark, rows)), np.int64)
        return np.asarray(np.isin(marks, self.marks) & np.array([len(items) > 0 for items in rows], bool), np.bool_)

    def files(self, ids: Ids, contents: Contents) -> NDArray[np.bool_]:
        """(n,) whether a training row contains all items of each row except its text."""
        return self.whole({modality: each for modality, each in ids.items() if modality != TEXT}, contents)

    def save(self, folder: Path) -> None:
        """Write them to the folder of a bridge being saved."""
        if self:
            data = self.marks.astype("<i8")
            (folder / FILE).write_bytes(save({"marks": data}, {"sha256": hashlib.sha256(data.tobytes()).hexdigest()}))

    @classmethod
    def load(cls, folder: Path) -> TrainingRows:
        """The rows recorded in a bridge's folder; empty if there is no record.

        Raises:
            BridgekitError: the file is damaged.
        """
        file = folder / FILE
        try:
            if regular_size(file) > MAX_BYTES:
                raise ValueError("it is too large")
            with safe_open(file, "numpy") as tensors:
                marks: NDArray[np.int64] = tensors.get_tensor("marks")
                checksum = (tensors.metadata() or {}).get("sha256")
            if marks.dtype != np.int64 or hashlib.sha256(marks.tobytes()).hexdigest() != checksum:
                raise ValueError("its checksum does not match")
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise BridgekitError(
                f"the bridge is damaged: {FILE} cannot be read ({error})",
                where=str(folder),
                remedy="copy the bridge again, or retrain it",
            ) from None
        return cls(marks.reshape(-1))


def _items(ids: Ids, contents: Contents, row: int) -> list[tuple[str, bytes]]:
    """The (modality, content) items of a row, in an order that does not depend on the table."""
    return [(modality, contents[modality][ids[modality][row]]) for modality in sorted(ids) if ids[modality][row] >= 0]


def _mark(items: Sequence[tuple[str, bytes]]) -> bytes:
    whole = b"".join(modality.encode() + b"\0" + content for modality, content in items)
    return hashlib.blake2b(whole, digest_size=8).digest()
