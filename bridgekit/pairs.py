"""A table of pairs in memory: rows of matching items, and the rows that were set aside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from bridgekit.encoders import Item

#: File extensions of each modality in folders. Formats that cannot be read are included, to be reported rather than skipped.
EXTENSIONS = {
    "audio": ["aac", "aif", "aiff", "au", "caf", "flac", "m4a", "mp3", "oga", "ogg", "opus", "w64", "wav", "wma"],
    "image": ["avif", "bmp", "gif", "heic", "jp2", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"],
}

#: Modality to n ids, one per row: rows with the same id hold the same item. Negative if the item is missing.
Content = Mapping[str, "Sequence[int] | npt.NDArray[np.int64]"]


@dataclass(frozen=True)
class SetAside:
    """An excluded row and the reason.

    Arguments:
        row: its number in a spreadsheet (the first data row of a CSV is 2; blank lines count). Parquet rows and files in class
            folders are counted from 1.
        column: the modality of the faulty item.
        item: the path or the beginning of the text.
        reason: one line.
    """

    row: int
    column: str
    item: str
    reason: str


@dataclass(frozen=True)
class Pairs:
    """A table with one column per modality; the items in a row belong together.

    Arguments:
        columns: modality to n items, one per row: absolute paths, or strings for `text`. None if the item is missing.
        source: the table's path or the name of a plugin's source.
        rows: n row numbers for messages, as in `SetAside.row`.
        split: n split names (`train`, `val`; any other is a test split), or None if the table defines none.
        group: n labels, or None. All items of a group match each other.
        set_aside: rows found unusable while reading.
    """

    columns: Mapping[str, tuple[Item | None, ...]]
    source: str
    rows: tuple[int, ...]
    split: tuple[str, ...] | None = None
    group: tuple[str, ...] | None = None
    set_aside: tuple[SetAside, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self.columns)

    def take(self, indices: Iterable[int]) -> Pairs:
        """A table of the rows with these 0-based indices, in this order. It keeps `set_aside`."""
        chosen = [int(index) for index in indices]
        return replace(
            self,
            columns={modality: tuple(items[i] for i in chosen) for modality, items in self.columns.items()},
            rows=tuple(self.rows[i] for i in chosen),
            split=None if self.split is None else tuple(self.split[i] for i in chosen),
            group=None if self.group is None else tuple(self.group[i] for i in chosen),
        )
