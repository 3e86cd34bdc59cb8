"""Opening tables: files, folders, plugins' sources and Python objects, as `Pairs` with unusable rows set aside."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError
from bridgekit.items import EXTENSIONS
from bridgekit.media import modality_of
from bridgekit.pairs import Column, Pairs, SetAside
from bridgekit.progress import say
from bridgekit.storage.bounded import OutOfBounds
from bridgekit.tables.columns import FILES, RESERVED, check_column, check_given, find_column, listed_columns, named_columns
from bridgekit.tables.folders import class_name, read_files, read_folder, walk
from bridgekit.tables.formats import FILL, TABLES, Cells, Records, read_records, read_utf8
from bridgekit.tables.memory import column_is_text, name_of_python, python_items, records_of_python
from bridgekit.tables.usable import Home, usable_rows

MAX_PATH = 500  # characters of a path in a message
SEARCHED = 20  # files of a column that are looked for in the folders beside the table


@dataclass(frozen=True)
class Table:
    """An opened table: read once, then queried for any columns.

    Arguments:
        source: the path of a table or folder, or the name of a plugin's source.
        load: returns its columns.
        folder: the folder that its paths are relative to; None if its cells are items.
        home: the folder that must contain its files after resolving links; None if they may be anywhere.
        given: modality to the column that the user named.
        known: its columns, where they are known before it is loaded.
        ready: the caller's own `Pairs`, whose rows need no checks.
        files: for a folder without a table: returns the columns for files of a given modality.
        paths: whether text in a cell may be the path of a file.
    """

    source: str
    load: Callable[[], Records] = field(repr=False)
    folder: Path | None = None
    home: Path | None = None
    given: Mapping[str, str] = field(default_factory=dict)
    known: Sequence[str] = ()
    ready: Pairs | None = field(default=None, repr=False)
    files: Callable[[str], Records] | None = field(default=None, repr=False)
    paths: bool = True
    _announced: set[str] = field(default_factory=set, repr=False)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Its columns in order, without `split` and `group`, by the modalities that they hold where these can be told."""
        names = list(self.known) or list(self.load().names)
        found = {self._find(modality, names): modality for modality in (*EXTENSIONS, TEXT, *self.given)}
        return tuple(found.get(name, name) for name in dict.fromkeys(names) if name and name not in RESERVED)

    def pairs(self, modalities: Sequence[str]) -> Pairs:
        """These columns of the usable rows; the other rows are in `set_aside`.

        Raises:
            BridgekitError: a column is missing, or no row is usable.
        """
        wanted = tuple(dict.fromkeys(modalities))
        selected = self._select(wanted)
        return selected if self.ready is not None else usable_rows(selected, wanted, self.home)

    def items(self, modality: str) -> tuple[list[Item], list[int], list[SetAside]]:
        """The distinct items of a modality, the first row of each, and the rows whose item cannot be used.

        Missing and repeated items are no errors in a list.
        """
        pairs = self.pairs((modality,))
        first: dict[Item, int] = {}
        for item, row in zip(pairs.column(modality), pairs.rows, strict=True):
            if item is not None:
                first.setdefault(item, row)
        faulty = [row for row in pairs.set_aside if row.item and not row.reason.startswith("the same as")]
        return list(first), list(first.values()), faulty

    def cells(self) -> dict[str, dict[int, str]]:
        """All texts and numbers as written: column to row number to cell. Of a list, the first."""
        records, found = self.load(), {}
        for name in filter(None, dict.fromkeys(records.names)):
            with contextlib.suppress(BridgekitError):  # its cells are neither text nor numbers
                cells = records.column(name)
                rows = records.rows if cells.rows is None else [records.rows[row] for row in cells.rows.tolist()]
                filled = zip(reversed(rows), reversed(cells.column), strict=True)
                found[name] = {int(row): str(cell) for row, cell in filled if cell is not None}
        return found

    def name_of(self, modality: str) -> str | None:
        """The name of a modality's column, or None if there is none, or no obvious one."""
        return self._find(modality, list(self.load().names))

    def _find(self, modality: str, names: Sequence[str]) -> str | None:
        features = self.load().features if not self.known else {}
        return find_column(modality, names, self.given, features, self._files)

    @cached_property
    def _files(self) -> dict[str, str | None]:
        """Columns such as `file_name`, and the modality of the files that they refer to."""
        found: dict[str, str | None] = {}
        for name in self.load().names if not self.known else ():
            if name.strip().lower() in FILES:
                with contextlib.suppress(BridgekitError):
                    first = [cell for cell in self.load().column(name).column[:SEARCHED] if isinstance(cell, str)]
                    found[name] = next((modality for modality in map(modality_of, first) if modality != TEXT), None)
        return found

    def _select(self, wanted: Sequence[str]) -> Pairs:
        """Unchecked rows with these columns."""
        records = self.load()
        check_given(self.given, wanted, self.source)
        others = [modality for modality in wanted if modality != TEXT]
        if self.files is not None and len(others) > 1:
            raise BridgekitError(
                f"a folder of files pairs {TEXT} with one other modality, not {' with '.join(wanted)}",
                where=self.source,
                remedy=f"give a table ({', '.join(TABLES)}) with a column for each",
            )
        if self.files is not None and others and others[0] not in records.names:
            records = self.files(others[0])
        if not records.names:
            raise BridgekitError("the table is empty", where=self.source, remedy=FILL)
        names = {modality: self._name(modality, wanted, records) for modality in wanted}
        if not records.rows:
            raise BridgekitError("the table has a header but no rows", where=self.source, remedy="add a row for each pair")
        cells = {modality: _cells(records, name) for modality, name in names.items()}
        lists = [modality for modality, each in cells.items() if each.rows is not None]
        if len(lists) > 1:
            what = f"the columns {listed_columns([names[modality] for modality in lists])} both have lists"
            raise BridgekitError(what, where=self.source, remedy="give one of them a text in each cell")
        rows = cells[lists[0]].rows if lists else None
        columns = {
            modality: self._items(
                each.column if rows is None or each.rows is not None else each.column.take(rows), modality, records, rows
            )
            for modality, each in cells.items()
        }
        split, group = (self._labels(records, name, rows) for name in RESERVED)
        numbers: Column[int] = Column(
            np.asarray(records.rows), np.arange(len(records.rows)) if rows is None else rows, make=int
        )
        return Pairs(columns, self.source, numbers, split, group, self.ready.set_aside if self.ready else records.set_aside)

    def _name(self, modality: str, wanted: Sequence[str], records: Records) -> str:
        """The column of a modality, announced if it was guessed."""
        found = self._find(modality, list(records.names))
        if found is None and [*records.names] == [*map(str, range(len(wanted)))]:  # tuples, in the order of the sides
            return records.names[list(wanted).index(modality)]
        name = check_column(modality, found, list(records.names), self.given, self.source)
        if name.casefold() != modality.casefold() and modality not in self.given and name not in self._announced:
            self._announced.add(name)
            say(f"{modality} from the column `{name}` (name another with --column {modality}=NAME)")
        return name

    def _items(self, column: Column[Any], modality: str, records: Records, rows: Any) -> Column[Item | None]:
        """A column's cells as items of a modality."""
        if not self.paths and modality != TEXT and column_is_text(column):
            what = f"the column for {modality} holds texts, not files"
            raise BridgekitError(what, where=self.source, remedy=f"name another with --column {modality}=NAME")
        column = python_items(column, modality)
        if modality == TEXT:
            if len(column.values) and not isinstance(column.value(0), str):
                what = f"the column for {TEXT} holds files, not texts"
                raise BridgekitError(what, where=self.source, remedy=f"name another with --column {TEXT}=NAME")
            return column
        if self.folder is None or not column.holds_text:
            return column if not column.holds_text else column.map(Path)
        if records.folders is None or len(records.folders.values) == 1:
            folder = self.folder if records.folders is None else records.folders.value(0)
            return Column(column.values, column.codes, folder=self._with_files(folder, column, modality))
        folders = records.folders if rows is None else records.folders.take(rows)
        return Column.of(None if cell is None else folder / cell for folder, cell in zip(folders, column, strict=True))

    def _with_files(self, folder: Path, column: Column[Any], modality: str) -> Path:
        """The folder that a column's paths are in: the table's, or the one folder in it with the files, which is announced."""
        spread = np.linspace(0, len(column) - 1, min(SEARCHED, len(column)), dtype=int)
        names = [name for name in column.take(spread) if isinstance(name, str)]
        if not names or any(os.path.lexists(folder / name) for name in names):
            return folder
        found = _folders_with(folder, names)
        if not found and (beside := _folders_with(folder.parent, names)):
            if self.home is not None:
                raise BridgekitError(
                    f"the {modality} files are not in the table's folder, but in {beside[0]}",
                    where=self.source,
                    remedy=f"give the folder of both, --pairs {folder.parent}, or add --outside",
                )
            found = beside
        if len(found) != 1:
            return folder
        if modality not in self._announced:
            self._announced.add(modality)
            say(f"the {modality} files are in `{found[0].name}/`")
        return found[0]

    def _labels(self, records: Records, name: str, rows: Any) -> Column[str] | None:
        """The cells of `split` or `group`, if the table has it."""
        found = find_column(name, list(records.names), {}, {})
        if found is None:
            return None
        cells = records.column(found)
        if cells.rows is not None:
            raise BridgekitError(f"the column `{found}` has lists", where=self.source, remedy="give it a text in each cell")
        column = cells.column.map(str)
        return column if rows is None else column.take(rows)


def _cells(records: Records, name: str) -> Cells:
    """The cells of a column, or of several with a cell of the row in each."""
    if name in records.names:
        return records.column(name)
    columns = [records.column(each).column for each in named_columns(name, records.names)]
    count, width = len(records.rows), len(columns)
    across = (np.arange(count)[:, None] + count * np.arange(width)).reshape(-1)
    column = Column.joined(columns).take(across)
    there = (column.codes >= 0).reshape(count, width)
    there[:, 0] |= ~there.any(1)  # a row without any stays, to be set aside
    kept = np.flatnonzero(there.reshape(-1))
    return Cells(column.take(kept), kept // width)


def _folders_with(folder: Path, names: Sequence[str]) -> list[Path]:
    """The folders in a folder that have all of these files."""
    below = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink() and entry.name[0] != "."]
    return [place for place in below if all((place / name).is_file() for name in names)]


def open_table(source: Any, *, columns: Mapping[str, str] | None = None, outside: bool = False) -> Table:
    """Open a table, once.

    Arguments:
        source: the path of a table (.csv, .tsv, .json, .jsonl, .ndjson, .parquet, .arrow, .feather) or of a folder (see
            `bridgekit.tables.folders`), the name of a plugin's source, `provider:name`, `Pairs`, a pandas or polars DataFrame,
            an Arrow table, a `datasets.Dataset`, a list of tuples or dicts, or a dict of lists. An existing path takes
            precedence over a name.
        columns: modality to the name of its column, where that is not the modality's.
        outside: allow files outside the table's folder. A plugin's source and a table in memory may use any files.

    Raises:
        BridgekitError: the table does not exist or cannot be read. The message names the row and a fix.
    """
    given = dict(columns or {})
    if isinstance(source, Table):
        return source
    if isinstance(source, Pairs):
        return Table(source.source, partial(_records_of_pairs, source), given=given, ready=source)
    if not isinstance(source, str | Path):
        records = records_of_python(source)
        return Table(name_of_python(source), lambda: records, given=given)
    path = Path(source)
    with _readable(source):
        if path.is_dir():
            return _folder(path, given, outside)
        if path.exists():
            found = read_records(path)
            return Table(str(path), lambda: found, path.parent.absolute(), None if outside else path.parent, given)
    if ":" in str(source):
        from bridgekit.plugins import find_pair_source, pair_providers

        if path.suffix.lower() not in TABLES or str(source).partition(":")[0] in pair_providers():
            named = find_pair_source(str(source))
            return source_table(named.name, named.modalities, named.build, given)
    raise _missing(source)


def source_table(name: str, known: Sequence[str], build: Callable[[], Any], given: Mapping[str, str]) -> Table:
    """A plugin's table of pairs, built on first use. Its columns are known before, if `known` names them."""
    return Table(name, cache(lambda: open_table(build()).load()), given=given, known=known, paths=bool(known))


def _folder(path: Path, given: Mapping[str, str], outside: bool) -> Table:
    records, home = read_folder(path, outside), None if outside else path
    if records is not None:
        return Table(str(path), lambda: records, path.absolute(), home, given)
    load = cache(lambda: read_files(path, outside))
    return Table(str(path), load, None, home, given, files=partial(read_files, path, outside))


def _records_of_pairs(pairs: Pairs) -> Records:
    columns: dict[str, Column[Any]] = {name: pairs.column(name) for name in pairs.modalities}
    columns |= {name: cells for name, cells in (("split", pairs.split), ("group", pairs.group)) if isinstance(cells, Column)}
    return Records(list(columns), pairs.rows, lambda name: Cells(columns[name]), set_aside=pairs.set_aside)


def read_pairs(
    source: Any, modalities: Sequence[str], *, columns: Mapping[str, str] | None = None, outside: bool = False
) -> Pairs:
    """Read a table of pairs: its usable rows, with the others in `set_aside`.

    A table has one column per modality. The `text` column holds texts; the others hold file paths relative to the table's
    folder, or the files themselves. Columns are found by the modality's name, in any case, or by a common name such as `img`
    or `caption` if only one column has one. Empty cells are missing items. A list of texts makes a row of each. The columns
    `split` and `group` are optional; any others are ignored.

    A row is set aside if it has fewer than two items, refers to a missing or empty file or to one outside the table's folder
    (after resolving links), or repeats another row.

    Arguments:
        source: as for `open_table`.
        modalities: the columns to read.
        columns: modality to the name of its column, where that is not the modality's.
        outside: allow files outside the table's folder.

    Raises:
        BridgekitError: the table does not exist, lacks a column, is malformed or not UTF-8, or has no usable row. The
            message names the row and a fix.
    """
    return open_table(source, columns=columns, outside=outside).pairs(modalities)


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
    name = str(source)[:MAX_PATH]
    remedy = f"check the path; it is relative to {Path.cwd()}"
    if name.endswith(".tar"):
        remedy = f"name WebDataset shards as 'webdataset:{name}'"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and "." not in name:
        remedy += f", or name a data set on the hub as datasets:{name}"
    return BridgekitError("there is no such table", where=name, remedy=remedy)


def read_items(source: Any, modality: str, *, columns: Mapping[str, str] | None = None, outside: bool = False) -> list[Item]:
    """The distinct items of one modality: a table's column, the files in a folder and its subfolders, or a text file's lines.

    Arguments:
        source: as for `open_table`, or any folder, or a .txt file with one text per line.
        modality: the column to read, or the modality of the files or lines.
        columns: modality to the name of its column, where that is not the modality's.
        outside: as for `open_table`. Without it, links that lead outside a folder are ignored.

    Raises:
        BridgekitError: the source does not exist, or has no items of this modality.
    """
    with _readable(source if isinstance(source, str | Path) else ""):
        items = _items_in(source, modality, columns, outside)
    distinct = [item for item in dict.fromkeys(items) if item is not None]
    if not distinct:
        raise BridgekitError(
            f"found no {modality} items", where=str(source)[:MAX_PATH], remedy="give a table, folder or file that has some"
        )
    return distinct


def _items_in(source: Any, modality: str, columns: Mapping[str, str] | None, outside: bool) -> Iterable[Item | None]:
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.suffix.lower() == ".txt" and path.is_file() and modality == TEXT:
        return [line.strip() or None for line in read_utf8(path).splitlines()]
    if path is not None and path.is_dir() and modality != TEXT:
        extensions, home = EXTENSIONS.get(modality), Home(path)
        files = [Path(file) for file in walk(path.absolute(), outside)]
        fitting = [file for file in files if extensions is None or file.suffix[1:].lower() in extensions]
        if fitting:
            return [file for file in fitting if outside or home.holds(file)]
    table = open_table(source, columns=columns, outside=outside)
    if path is None or table.files is None:
        return table.pairs((modality,)).column(modality)
    if modality != TEXT:
        return []
    with contextlib.suppress(BridgekitError):
        return table.load().column(TEXT).column
    return [class_name(entry.name) for entry in sorted(path.iterdir()) if entry.is_dir()]
