"""Fingerprints of the rows a bridge was trained on, so that an evaluation can detect them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.storage.bounded import OutOfBounds
from bridgekit.storage.tensors import open_tensors

#: Maximum number of marks.
MOST = 1 << 28
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
        try:
            return cls(_read_marks(folder / FILE))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError) as error:
            raise BridgekitError(
                f"the bridge is damaged: {FILE} cannot be read ({error})",
                where=str(folder),
                remedy="copy the bridge again, or retrain it",
            ) from None


def _read_marks(path: Path) -> NDArray[np.int64]:
    """The marks in a file, read once, and no further than they ascend: what is not in memory yet takes none.

    Raises:
        OSError, ValueError: the file is missing, or is not what `TrainingRows.save` writes.
    """
    digest = hashlib.sha256()
    with open_tensors(path, 1) as file:
        (listed,) = file.listed
        if (listed.name, listed.dtype, len(listed.shape)) != ("marks", "I64", 1):
            raise OutOfBounds("it does not hold marks")
        if listed.shape[0] > MOST:
            raise OutOfBounds(f"it has {listed.shape[0]:,} marks, over {MOST:,}")
        marks = np.empty(listed.shape, "<i8")
        last: np.int64 | None = None
        for part in file.read_into(marks.view(np.uint8).data):
            digest.update(part)
            numbers = np.frombuffer(part, "<i8")
            if (last is not None and numbers[0] <= last) or not (numbers[1:] > numbers[:-1]).all():
                raise OutOfBounds("its marks do not ascend")
            last = numbers[-1]
        if digest.hexdigest() != file.metadata.get("sha256"):
            raise OutOfBounds("its checksum does not match")
    return marks.astype(np.int64, copy=False)


def _items(ids: Ids, contents: Contents, row: int) -> list[tuple[str, bytes]]:
    """The (modality, content) items of a row, in an order that does not depend on the table."""
    return [(modality, contents[modality][ids[modality][row]]) for modality in sorted(ids) if ids[modality][row] >= 0]


def _mark(items: Sequence[tuple[str, bytes]]) -> bytes:
    whole = b"".join(modality.encode() + b"\0" + content for modality, content in items)
    return hashlib.blake2b(whole, digest_size=8).digest()
