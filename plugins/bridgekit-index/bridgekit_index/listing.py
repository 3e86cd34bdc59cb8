"""The distinct items of one modality in a table, folder or text file, with the table's other cells."""

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
        modality: their modality.
        items: n distinct paths or texts.
        source: absolute path of the table, folder or text file, or name of a plugin's source.
        rows: n row numbers for messages; default: position + 1.
        cells: column name to n cells, "" if empty.
        set_aside: rows found unusable while reading.
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


def list_items(
    source: str | Path | Table, modality: str, *, columns: Mapping[str, str] | None = None, outside: bool = False
) -> Listing:
    """The items of a table, a plugin's source, a folder of files, or a .txt file with one item per line.

    An item in several rows gets the cells of the first.

    Arguments:
        source: as for `bridgekit.tables.reading.read_items`, or the result of `open_listed`.
        modality: the column to list, or the modality of the files or lines.
        columns: modality to the name of its column, where that is not the modality's.
        outside: let a table refer to files outside its own folder.

    Raises:
        BridgekitError: the source does not exist, or has no items of this modality.
    """
    table = open_listed(source, columns=columns, outside=outside)
    if not isinstance(table, Table):
        return Listing(modality, read_items(table, modality, columns=columns, outside=outside), str(table.absolute()))
    items, rows, faulty = table.items(modality)
    cells = {name: [column.get(row, "") for row in rows] for name, column in table.cells().items()}
    path = Path(table.source)
    return Listing(modality, items, str(path.absolute()) if path.exists() else table.source, rows, cells, faulty)


def open_listed(source: str | Path | Table, *, columns: Mapping[str, str] | None = None, outside: bool = False) -> Table | Path:
    """The opened table, so that it is read once for all modalities; or the path of a .txt file, or of a folder without one."""
    if isinstance(source, Table):
        return source
    path = Path(source)
    if path.suffix.lower() == ".txt" and path.is_file():
        return path
    table = open_table(source, columns=columns, outside=outside)
    return table if table.files is None else path


def listed_modalities(source: str | Path | Table, among: Sequence[str]) -> list[str]:
    """Which of these modalities a table, folder or text file has, by its columns or by file extensions.

    Raises:
        BridgekitError: the source does not exist, or has none of them.
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
            f"found no {' or '.join(among)}",
            where=opened.source if isinstance(opened, Table) else str(opened),
            remedy="rename its columns, or set the modality of its files with --modality",
        )
    return found
