"""Opening table files, class folders and plugins' sources as `Pairs`, with unusable rows set aside."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.pairs import EXTENSIONS, Pairs, SetAside
from bridgekit.plain import plain
from bridgekit.storage.bounded import OutOfBounds, file_size, homes, is_within, unreadable
from bridgekit.tables.formats import FILL, TABLES, read_records, read_utf8
from bridgekit.tables.splits import split_name

MAX_PATH = 500  # characters of a path in a message
SEARCHED, SHOWN = 1_000, 20  # column names that are searched for a close match, and listed in a message
LEAVES = "its path leads outside the table's folder: move the file there, or allow it with --outside"
_OPTIONAL = ("split", "group")


@dataclass(frozen=True)
class Table:
    """An opened table: read once, then queried for any columns.

    Arguments:
        source: the path of a table or folder, or the name of a plugin's source.
        modalities: its columns in order, without `split` and `group`. A folder of class folders has `text`, and audio or
            image, whichever has more files.
        select: returns unchecked rows with the given columns.
        home: the folder that must contain its files after resolving links; None if they may be anywhere.
        cells: returns all non-empty cells as written: column name to row number to cell.
        checked: the rows need no checks: the caller's own `Pairs`.
    """

    source: str
    modalities: tuple[str, ...]
    select: Callable[[tuple[str, ...]], Pairs] = field(repr=False)
    home: Path | None = None
    cells: Callable[[], dict[str, dict[int, str]]] = field(default=dict, repr=False)
    checked: bool = False

    def pairs(self, modalities: Sequence[str]) -> Pairs:
        """These columns of the usable rows; the other rows are in `set_aside`.

        Raises:
            BridgekitError: a column is missing, or no row is usable.
        """
        wanted = tuple(dict.fromkeys(modalities))
        selected = self.select(wanted)
        return selected if self.checked else _usable(selected, wanted, self.home)


def open_table(source: str | Path | Pairs | Table, *, outside: bool = False) -> Table:
    """Open a table, once.

    Arguments:
        source: the path of a table (.csv, .tsv, .jsonl, .ndjson, .parquet) or of a folder of class folders, the name of a
            plugin's source, `provider:name`, or `Pairs`. An existing path takes precedence over a name.
        outside: allow files outside the table's folder. A plugin's source may use any files.

    Raises:
        BridgekitError: the table does not exist or cannot be read. The message names the row and a fix.
    """
    if isinstance(source, Table):
        return source
    if isinstance(source, Pairs):
        return _in_memory(source.source, source.modalities, lambda: source, checked=True)
    path = Path(source)
    with _readable(source):
        if path.is_dir():
            return _class_folders(path, None if outside else path)
        if path.exists():
            return _table_file(path, None if outside else path.parent)
    if ":" in str(source) and path.suffix.lower() not in TABLES:
        from bridgekit.plugins import find_pair_source

        named = find_pair_source(str(source))
        return _in_memory(named.name, named.modalities, cache(named.build))
    raise _missing(source)


def read_pairs(source: str | Path, modalities: Sequence[str], *, outside: bool = False) -> Pairs:
    """Read a table of pairs: its usable rows, with the others in `set_aside`.

    A table has a header and one column per modality, named after it. The `text` column holds texts; the others hold file
    paths relative to the table's folder. Empty cells are missing items. The columns `split` and `group` are optional; any
    others are ignored. In a folder of class folders, a folder's name is the text of all its files.

    A row is set aside if it has fewer than two items, refers to a missing or empty file or to one outside the table's folder
    (after resolving links), or repeats another row.

    Arguments:
        source: as for `open_table`.
        modalities: the columns to read.
        outside: allow files outside the table's folder.

    Raises:
        BridgekitError: the table does not exist, lacks a column, is malformed or not UTF-8, or has no usable row. The
            message names the row and a fix.
    """
    return open_table(source, outside=outside).pairs(modalities)


@contextlib.contextmanager
def _readable(source: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise _missing(source) from None
    except (OSError, OutOfBounds) as error:
        reason = getattr(error, "strerror", None) or error
        # An OSError without an errno comes from a library that cannot parse the file.
        refused_by_system = isinstance(error, OSError) and error.errno is not None
        remedy = "check its name and permissions" if refused_by_system else "write the table again, as a regular file"
        raise BridgekitError(f"the table cannot be read ({reason})", where=str(source)[:MAX_PATH], remedy=remedy) from None


def _missing(source: str | Path) -> BridgekitError:
    return BridgekitError(
        "there is no such table", where=str(source)[:MAX_PATH], remedy=f"check the path; it is relative to {Path.cwd()}"
    )


def read_items(source: str | Path, modality: str, *, outside: bool = False) -> list[Item]:
    """The distinct items of one modality: a table's column, the files in a folder and its subfolders, or a text file's lines.

    Arguments:
        source: as for `open_table`, or any folder, or a .txt file with one text per line.
        modality: the column to read, or the modality of the files or lines.
        outside: as for `open_table`. Without it, links that lead outside a folder are ignored.

    Raises:
        BridgekitError: the source does not exist, or has no items of this modality.
    """
    with _readable(source):
        items = _items_in(Path(source), source, modality, outside)
    distinct = [item for item in dict.fromkeys(items) if item is not None]
    if not distinct:
        raise BridgekitError(
            f"found no {modality} items", where=str(source), remedy="give a table, folder or file that has some"
        )
    return distinct


def _items_in(path: Path, source: str | Path, modality: str, outside: bool) -> Iterable[Item | None]:
    if path.is_dir() and modality != TEXT:
        extensions = EXTENSIONS.get(modality)
        files = sorted(file for file in path.absolute().rglob("*") if file.is_file() and file.name[0] != ".")
        fitting = [file for file in files if extensions is None or file.suffix[1:].lower() in extensions]
        home = Home(path)
        return [file for file in fitting if outside or home.holds(file)]
    if path.is_dir():
        return [_class_name(entry) for entry in sorted(path.iterdir()) if entry.is_dir()]
    if path.suffix.lower() == ".txt" and path.is_file() and modality == TEXT:
        return [line.strip() or None for line in read_utf8(path).splitlines()]
    return read_pairs(source, (modality,), outside=outside).columns[modality]


def _in_memory(source: str, modalities: Sequence[str], build: Callable[[], Pairs], checked: bool = False) -> Table:
    """A table of pairs in memory, or built on first use."""

    def select(wanted: tuple[str, ...]) -> Pairs:
        pairs = build()
        _check_columns(pairs.modalities, wanted, source)
        return pairs

    def cells() -> dict[str, dict[int, str]]:
        pairs = build()
        columns = {**pairs.columns, "split": pairs.split or (), "group": pairs.group or ()}
        filled = {name: zip(pairs.rows, items, strict=False) for name, items in columns.items()}
        return {name: {row: str(item) for row, item in items if item} for name, items in filled.items()}

    return Table(source, tuple(modalities), select, cells=cells, checked=checked)


def _table_file(path: Path, home: Path | None) -> Table:
    """A table file. Cells are stripped; empty ones are missing items."""
    records = read_records(path)
    folder = path.parent.absolute()

    def select(wanted: tuple[str, ...]) -> Pairs:
        if not records.names:
            raise BridgekitError("the table is empty", where=str(path), remedy=FILL)
        _check_columns(records.names, wanted, str(path))
        if not records.rows:
            raise BridgekitError("the table has a header but no rows", where=str(path), remedy="add a row for each pair")
        columns = {
            name: tuple(cell if cell is None or name == TEXT else folder / cell for cell in records.column(name))
            for name in wanted
        }
        split, group = (
            tuple(cell or "" for cell in records.column(name)) if name in records.names else None for name in _OPTIONAL
        )
        return Pairs(columns, str(path), tuple(records.rows), split, group)

    def cells() -> dict[str, dict[int, str]]:
        found: dict[str, dict[int, str]] = {}
        for name in filter(None, records.names):
            with contextlib.suppress(BridgekitError):  # its cells are neither text nor numbers
                found[name] = {row: cell for row, cell in zip(records.rows, records.column(name), strict=True) if cell}
        return found

    names = (name for name in dict.fromkeys(records.names) if name and name not in _OPTIONAL)
    return Table(str(path), tuple(names), select, home, cells)


def _class_folders(path: Path, home: Path | None) -> Table:
    """A folder of class folders: a row for each of their files, with the name of its class folder as its text."""
    endings = [file.suffix[1:].lower() for file in path.glob("*/*")]
    count = {modality: sum(ending in known for ending in endings) for modality, known in EXTENSIONS.items()}

    def select(modalities: tuple[str, ...]) -> Pairs:
        files = [modality for modality in modalities if modality != TEXT]
        if TEXT not in modalities or len(files) != 1:
            raise BridgekitError(
                f"a folder of class folders pairs {TEXT} with one other modality, not {' with '.join(modalities)}",
                where=str(path),
                remedy=f"give a table ({', '.join(TABLES)}) with a column for each",
            )
        extensions = EXTENSIONS.get(files[0])
        rows: list[tuple[Item, Item | None]] = [
            (file, _class_name(label))
            for label in sorted(entry for entry in path.absolute().iterdir() if entry.is_dir() and entry.name[0] != ".")
            for file in sorted(label.iterdir())
            if file.name[0] != "." and (extensions is None or file.suffix[1:].lower() in extensions)
        ]
        if not rows:
            raise BridgekitError(
                f"the folder has no class folders with {files[0]} files",
                where=str(path),
                remedy=f"arrange the files as FOLDER/class_name/file, or give a table ({', '.join(TABLES)})",
            )
        columns = dict(zip((files[0], TEXT), zip(*rows, strict=True), strict=True))
        return Pairs({modality: columns[modality] for modality in modalities}, str(path), tuple(range(1, len(rows) + 1)))

    return Table(str(path), (max(count, key=lambda name: count[name]), TEXT), select, home)


def _class_name(folder: Path) -> str | None:
    return " ".join(folder.name.replace("_", " ").replace("-", " ").split()) or None


def _check_columns(names: Sequence[str], wanted: Sequence[str], where: str) -> None:
    """Raise BridgekitError if a column is missing, naming the column that was probably meant."""
    for modality in wanted:
        if names.count(modality) > 1:
            raise BridgekitError(f"the table has several columns named `{modality}`", where=where, remedy="rename all but one")
        if modality in names:
            continue
        lowered = {name.lower(): name for name in names[:SEARCHED] if len(name) < 100}
        close = difflib.get_close_matches(modality, lowered, n=1)
        if len(names) == 1 and any(mark in names[0] for mark in ",;\t|"):
            remedy = "separate the cells with commas (.csv) or tabs (.tsv)"
        elif any("\0" in name for name in names):
            remedy = "save the table as UTF-8: it has NUL bytes, so it may be UTF-16"
        elif close:
            remedy = f"rename the column `{lowered[close[0]]}` to `{modality}`"
        else:
            remedy = f"rename the column with the {modality} items to `{modality}`"
        what = f"the table has no column `{modality}`; its columns are {listed_columns(names)}"
        raise BridgekitError(what, where=where, remedy=remedy)


def listed_columns(names: Sequence[str]) -> str:
    """Column names for a message: at most `SHOWN`, with long ones cut."""
    found = ", ".join(f"`{plain(name)[:60]}`" for name in names[:SHOWN])
    return found + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


class Home:
    """The folder that must contain a table's files after resolving links.

    Each parent folder is resolved only once: a table may refer to a million files in a few folders.
    """

    def __init__(self, folder: Path) -> None:
        self._places = homes(folder)
        self._parent_inside = cache(partial(is_within, places=self._places))

    def holds(self, file: Path) -> bool:
        """Whether the file's path, existing or not, is inside the folder."""
        parent, name = os.path.split(file)
        if name in ("", ".", "..") or file.is_symlink():
            return is_within(file, self._places)
        return self._parent_inside(parent)


def _usable(pairs: Pairs, modalities: Sequence[str], folder: Path | None) -> Pairs:
    """These columns of the usable rows, whose files must be in `folder` if given; the other rows are added to `set_aside`."""
    home = Home(folder) if folder is not None else None
    columns = {modality: pairs.columns[modality] for modality in modalities}
    kept: list[int] = []
    set_aside = list(pairs.set_aside)
    first: dict[tuple[Item | None, ...], int] = {}
    for index, (row, items) in enumerate(zip(pairs.rows, zip(*columns.values(), strict=True), strict=True)):
        fault = _fault(dict(zip(modalities, items, strict=True)), home)
        if fault is None and items in first:
            other = first[items]
            leak = pairs.split is not None and split_name(pairs.split[index]) != split_name(pairs.split[other])
            fault = (modalities[0], f"the same as row {pairs.rows[other]}{', in another split' if leak else ''}")
        if fault is None:
            first[items] = index
            kept.append(index)
        else:
            column, reason = fault
            set_aside.append(SetAside(row, column, str(columns[column][index] or "")[:200], reason))
    if not kept:
        why = f" (row {set_aside[0].row}: {set_aside[0].reason}: {set_aside[0].item})" if set_aside else ""
        remedy = "fix the table; its paths are relative to its own folder"
        if set_aside and set_aside[0].reason == LEAVES:
            remedy = "move the files into the table's folder, or if you trust it, add --outside (in Python: outside=True)"
        raise BridgekitError(f"none of the {len(set_aside):,} rows is usable{why}", where=pairs.source, remedy=remedy)
    split = tuple(map(split_name, pairs.split)) if pairs.split and any(pairs.split) else None
    group = pairs.group if pairs.group and any(pairs.group) else None
    return Pairs(columns, pairs.source, pairs.rows, split, group, tuple(set_aside)).take(kept)


def _fault(items: Mapping[str, Item | None], home: Home | None) -> tuple[str, str] | None:
    """The faulty column and the reason if a row is unusable, else None."""
    empty = [modality for modality, item in items.items() if item is None]
    if len(items) - len(empty) < min(2, len(items)):
        return empty[0], f"no item in this column, and a pair needs two of {', '.join(items)}"
    for modality, item in items.items():
        if not isinstance(item, Path):
            continue
        try:
            if home and not home.holds(item):
                return modality, LEAVES
            file_size(item)
        except ItemError as error:
            return modality, error.what
        except (OSError, ValueError) as error:  # from `holds`, for an invalid name
            return modality, unreadable(item, error).what
    return None
