"""The items of one modality in a table, a folder or a text file, each once, with the other columns of its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError
from bridgekit.pairs import EXTENSIONS, SetAside
from bridgekit.tables.reading import Table, open_table, read_items


@dataclass(frozen=True)
class Listing:
    """Items of one modality.

    Arguments:
        modality: what the items are.
        items: n paths or texts, no two the same.
        source: where they come from: the absolute path of a table, folder or text, or a plugin's source name.
        rows: n row numbers for messages, as `SetAside.row`; empty where the row is the position + 1.
        cells: name of a column to n cells, "" where the table has none.
        set_aside: rows that were found unusable while reading.
    """

    modality: str
    items: Sequence[Item]
    source: str = ""
    rows: Sequence[int] = ()
    cells: Mapping[str, Sequence[str]] = field(default_factory=dict)
    set_aside: Sequence[SetAside] = ()

    def __len__(self) -> int:
        return len(self.items)

    def row(self, position: int) -> int:
        """The first row of an item."""
        return self.rows[position] if self.rows else position + 1


def list_items(source: str | Path | Table, modality: str, *, outside: bool = False) -> Listing:
    """The items of a table, a plugin's source, a folder of files, or a .txt with a text a line.

    An item that is in several rows has the cells of the first one.

    Arguments:
        source: as for `bridgekit.tables.reading.read_items`, or what `open_listed` returned.
        modality: the column to read; or what the files or lines are.
        outside: let a table name files outside its own folder.

    Raises:
        BridgekitError: there is no such thing, or there is nothing in it.
    """
    table = open_listed(source, outside=outside)
    if not isinstance(table, Table):
        return Listing(modality, read_items(table, modality, outside=outside), str(table.absolute()))
    pairs = table.pairs((modality,))
    first: dict[Item, int] = {}
    for item, row in zip(pairs.columns[modality], pairs.rows, strict=True):
        if item is not None:
            first.setdefault(item, row)
    rows = list(first.values())
    cells = {name: [column.get(row, "") for row in rows] for name, column in table.cells().items()}
    # An empty cell, or an item that another row has too, is fine in a list of items.
    faulty = [row for row in pairs.set_aside if row.item and not row.reason.startswith("the same as")]
    path = Path(table.source)
    return Listing(modality, list(first), str(path.absolute()) if path.exists() else table.source, rows, cells, faulty)


def open_listed(source: str | Path | Table, *, outside: bool = False) -> Table | Path:
    """The opened table, so that it is read once for all its modalities; or the path of a folder or of a text file."""
    if not isinstance(source, Table) and (
        (path := Path(source)).is_dir() or (path.suffix.lower() == ".txt" and path.is_file())
    ):
        return path
    return open_table(source, outside=outside)


def listed_modalities(source: str | Path | Table, among: Sequence[str]) -> list[str]:
    """Which of some modalities a table, folder or text has, by its columns or by the extensions of its files.

    Raises:
        BridgekitError: there is no such thing, or it has none of these.
    """
    opened = open_listed(source)
    if isinstance(opened, Table):
        found = [modality for modality in among if modality in opened.modalities]
    elif opened.is_dir():
        extensions = {file.suffix[1:].lower() for file in opened.rglob("*") if file.is_file()}
        found = [modality for modality in among if extensions & set(EXTENSIONS.get(modality, ()))]
    else:
        found = [modality for modality in among if modality == TEXT]
    if not found:
        raise BridgekitError(
            f"it has no {' or '.join(among)}",
            where=opened.source if isinstance(opened, Table) else str(opened),
            remedy="rename its columns, or give the modality of its files with --modality",
        )
    return found
