"""The items of one modality that a table, folder or text has, each once, with what the table says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError
from bridgekit.pairs import SetAside
from bridgekit.tables.reading import read_cells, read_items, read_pairs


@dataclass(frozen=True)
class Listing:
    """Items of one modality.

    Arguments:
        modality: what the items are.
        items: n paths or texts, no two the same.
        source: where they come from: the absolute path of a table, folder or text, or a plugin's source name.
        rows: n row numbers for messages, as `SetAside.row`; empty where position + 1 tells as much.
        cells: name of a column to n cells, "" where the table has none.
        set_aside: rows that were already found unusable.
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
        """The row that an item stands in first."""
        return self.rows[position] if self.rows else position + 1


def list_items(source: str | Path, modality: str, *, outside: bool = False) -> Listing:
    """Read a table, a plugin's source, a folder of files, or a .txt of lines.

    An item that stands in several rows has the cells of the first one.

    Arguments:
        source: as for `bridgekit.tables.reading.read_items`.
        modality: which column; or what the files or lines are.
        outside: let a table name files outside its own folder.

    Raises:
        BridgekitError: there is no such thing, or there is nothing in it.
    """
    path = Path(source)
    if path.is_dir() or (path.suffix.lower() == ".txt" and modality == TEXT):
        return Listing(modality, read_items(source, modality, outside=outside), str(path.absolute()))
    pairs = read_pairs(source, (modality,), outside=outside)
    first: dict[Item, int] = {}
    for item, row in zip(pairs.columns[modality], pairs.rows, strict=True):
        if item is not None:
            first.setdefault(item, row)
    rows = list(first.values())
    cells = {name: [column.get(row, "") for row in rows] for name, column in read_cells(source).items()}
    # A hole, or an item that another row has too, is no fault where items are listed.
    faulty = [row for row in pairs.set_aside if row.item and not row.reason.startswith("the same as")]
    return Listing(modality, list(first), str(path.absolute()) if path.exists() else str(source), rows, cells, faulty)


def listed_modalities(source: str | Path, among: Sequence[str]) -> list[str]:
    """Which of some modalities a table, folder or text has, told by its columns or by the endings of its files.

    Raises:
        BridgekitError: there is no such thing, or it has none of these.
    """
    from bridgekit.pairs import EXTENSIONS
    from bridgekit.tables.reading import table_modalities

    path = Path(source)
    if path.is_dir():
        endings = {file.suffix[1:].lower() for file in path.rglob("*") if file.is_file()}
        found = [modality for modality in among if endings & set(EXTENSIONS.get(modality, ()))]
    elif path.suffix.lower() == ".txt" and path.is_file():
        found = [modality for modality in among if modality == TEXT]
    else:
        columns = table_modalities(source)
        found = [modality for modality in among if modality in columns]
    if not found:
        raise BridgekitError(
            f"it has no {' or '.join(among)}",
            where=str(source),
            remedy="rename its columns, or say with --modality what its files are",
        )
    return found
