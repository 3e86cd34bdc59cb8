"""A table of pairs in memory: rows of items that belong together, and the rows that were set aside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bridgekit.encoders import Item

#: Files that a class folder may hold. Formats that cannot be read are listed too: they are then reported, not overlooked.
EXTENSIONS = {
    "audio": ["aac", "aif", "aiff", "au", "caf", "flac", "m4a", "mp3", "oga", "ogg", "opus", "w64", "wav", "wma"],
    "image": ["avif", "bmp", "gif", "heic", "jp2", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"],
}


#: Modality to n ids, one a row of a table: rows with the same id hold the same item. Negative for a hole.
Content = Mapping[str, "Sequence[int] | npt.NDArray[np.int64]"]


@dataclass(frozen=True)
class SetAside:
    """A row that is left out, and why.

    Arguments:
        row: the row's number as a spreadsheet shows it (a CSV's first row of data is 2; blank lines count). The rows of a
            Parquet table, and the files of class folders, are counted from 1.
        column: the modality whose item is at fault.
        item: the path or the beginning of the text.
        reason: one line.
    """

    row: int
    column: str
    item: str
    reason: str


@dataclass(frozen=True)
class Pairs:
    """A table whose columns are modalities and whose rows hold items that belong together.

    Arguments:
        columns: modality to its n items, one a row: absolute paths of files, or, for `text`, strings. None is a hole.
        source: where the table came from: a path, or a plugin's source name.
        rows: n row numbers for messages, as `SetAside.row`.
        split: n names (`train`, `val`, and any other name for a test split), or None where the table says nothing.
        group: n labels, or None. Rows of one group all belong together.
        set_aside: rows already found unusable while reading.
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
        """The table of these rows, counted from 0, in this order. It still tells what was set aside while reading."""
        chosen = [int(index) for index in indices]
        return Pairs(
            columns={modality: tuple(items[i] for i in chosen) for modality, items in self.columns.items()},
            source=self.source,
            rows=tuple(self.rows[i] for i in chosen),
            split=None if self.split is None else tuple(self.split[i] for i in chosen),
            group=None if self.group is None else tuple(self.group[i] for i in chosen),
            set_aside=self.set_aside,
        )
