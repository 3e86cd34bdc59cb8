"""The pair table: rows of items that belong together, from CSV, TSV, JSON Lines, Parquet, class folders or a plugin."""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bridgekit.bounded import OutOfBounds, homes, is_within, open_regular, parse_json, read_bounded, why_no_json
from bridgekit.encoders import TEXT, Item
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.isolation import decode
from bridgekit.plain import plain

MIN_ROWS = 10  # to learn anything, and to leave one row each for validation and test

MAX_TABLE = 4 << 30  # bytes
MAX_ROW = 16 << 20  # characters of a row of JSON Lines, or of a cell of CSV
FILL = "write a header that names its columns, and rows"  # what to do about an empty table
MAX_PATH = 500  # characters of a path in a message
MANY, SHOWN = 1_000, 20  # names of columns that are searched for a likely one, and that are told
LEAVES = "its path leads out of the table's folder: move the file there, or allow it with --outside"

_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "dev")
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_OPTIONAL = ("split", "group")
#: A table as read: the names of its columns, and for each row its number and as many cells.
_Records = tuple[list[str], list[tuple[int, "list[str | None]"]]]
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


# ---- reading a table


def read_pairs(source: str | Path, modalities: Sequence[str], *, outside: bool = False) -> Pairs:
    """Read a table of pairs, and set aside the rows that cannot be used.

    A table has a header, and a column for each modality, named like it. Cells hold texts in the column `text` and paths
    of files, relative to the table's folder, in all others; an empty cell is a hole. The columns `split` and `group` are
    optional, all others are ignored. In a folder of class folders, a folder's name is the text of all files in it.

    Set aside are rows with fewer than two items, with a file that is missing or empty, those that repeat another row, and
    those with a path that, all links followed, leads out of the table's folder.

    Arguments:
        source: the path of a table (.csv, .tsv, .jsonl, .ndjson, .parquet) or of a folder of class folders, or the name
            of a plugin's source, `provider:name`. A path wins over a name.
        modalities: the columns to read.
        outside: whether files may lie outside the table's folder. Those of a plugin's source may lie anywhere.

    Returns:
        the rows that can be used.

    Raises:
        BridgekitError: there is no such table, it lacks a column, is malformed or not in UTF-8, or none of its rows can
            be used. The message says which row, and how to mend it.
    """
    path = Path(source)
    wanted = tuple(dict.fromkeys(modalities))
    with _readable(source):
        if path.is_dir():
            return _usable(_class_folders(path, wanted), wanted, None if outside else path)
        if path.exists():
            return _usable(_table(path, wanted), wanted, None if outside else path.parent)
    if ":" in str(source) and path.suffix.lower() not in _TABLES:
        from bridgekit.plugins import find_pair_source

        built = find_pair_source(str(source)).build()
        _check_columns(built.modalities, wanted, str(source))
        return _usable(built, wanted)
    raise _missing(source)


@contextlib.contextmanager
def _readable(source: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise _missing(source) from None
    except (OSError, OutOfBounds) as error:
        reason = getattr(error, "strerror", None) or error
        # Without a number of its own it is not the system's, but that of a library that does not understand the file.
        refused_by_system = isinstance(error, OSError) and error.errno is not None
        remedy = "check its name and permissions" if refused_by_system else "write the table anew, as one regular file"
        raise BridgekitError(f"the table cannot be read ({reason})", where=str(source)[:MAX_PATH], remedy=remedy) from None


def _missing(source: str | Path) -> BridgekitError:
    return BridgekitError(
        "there is no such table of pairs", where=str(source)[:MAX_PATH], remedy=f"check the path; it is taken from {Path.cwd()}"
    )


def table_modalities(source: str | Path | Pairs) -> tuple[str, ...]:
    """The columns of a table that may be modalities, in its order: all but `split` and `group`.

    A folder of class folders has `text`, and whichever of audio and image most of its files are.

    Arguments:
        source: as for `read_pairs`.

    Raises:
        BridgekitError: there is no such table, or it cannot be read.
    """
    if isinstance(source, Pairs):
        return source.modalities
    path = Path(source)
    with _readable(source):
        if path.is_dir():
            endings = [file.suffix[1:].lower() for file in path.glob("*/*")]
            count = {modality: sum(ending in known for ending in endings) for modality, known in EXTENSIONS.items()}
            return (max(count, key=lambda modality: count[modality]), TEXT)
        if not path.exists() and ":" in str(source) and path.suffix.lower() not in _TABLES:
            from bridgekit.plugins import find_pair_source

            return find_pair_source(str(source)).modalities
        names, _ = _read_table(path, ())
    return tuple(name for name in dict.fromkeys(names) if name and name not in _OPTIONAL)


def read_items(source: str | Path, modality: str, *, outside: bool = False) -> list[Item]:
    """The distinct items of one modality: a table's or source's column, the files in a folder and below, or a text's lines.

    Arguments:
        source: as for `read_pairs`, or any folder, or a .txt file with one text a line.
        modality: which column; or what the files or lines are.
        outside: as for `read_pairs`. Without it, links that leave a folder are no files of it.

    Raises:
        BridgekitError: there is no such thing, or there is nothing in it.
    """
    with _readable(source):
        items = _items_in(Path(source), source, modality, outside)
    distinct = [item for item in dict.fromkeys(items) if item is not None]
    if not distinct:
        raise BridgekitError(
            f"there is no {modality} in it", where=str(source), remedy="name a table, folder or file that has some"
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
        return [" ".join(re.split(r"[\s_-]+", entry.name)) for entry in sorted(path.iterdir()) if entry.is_dir()]
    if path.suffix.lower() == ".txt" and path.is_file() and modality == TEXT:
        return [line.strip() or None for line in _read_utf8(path).splitlines()]
    return read_pairs(source, (modality,), outside=outside).columns[modality]


def read_cells(source: str | Path) -> dict[str, dict[int, str]]:
    """Every column of a table, as it is written: its name to the cells by row number, as `Pairs.rows` has them.

    Empty cells are left out, and so are columns of a Parquet or JSON Lines table that hold neither texts nor numbers.

    Arguments:
        source: a table or a plugin's source, as for `read_pairs`.

    Raises:
        BridgekitError: there is no such table, or it cannot be read.
    """
    path = Path(source)
    cells: dict[str, dict[int, str]] = {}
    if not path.exists() and ":" in str(source) and path.suffix.lower() not in _TABLES:
        from bridgekit.plugins import find_pair_source

        built = find_pair_source(str(source)).build()
        columns = {**built.columns, "split": built.split or (), "group": built.group or ()}
        for name, items in columns.items():
            cells[name] = {row: str(item) for row, item in zip(built.rows, items, strict=False) if item}
        return cells
    with _readable(source):
        names, records = _read_table(path, ())
        for at, name in enumerate(names):
            if path.suffix.lower() not in (".csv", ".tsv"):  # those cells were not asked for yet
                try:
                    _, records = _read_table(path, (name,))
                except BridgekitError:
                    continue
            cells[name] = {row: cell for row, record in records if (cell := record[at])}
    return {name: column for name, column in cells.items() if name}


def _read_table(path: Path, wanted: Sequence[str]) -> _Records:
    """Names of columns, and rows: of Parquet and JSON Lines only the wanted columns' cells."""
    suffix = path.suffix.lower()
    if suffix not in _TABLES:
        raise BridgekitError(
            f"a table of pairs cannot be read from {suffix or 'a file without an extension'}",
            where=str(path),
            remedy=f"save it as one of {', '.join(_TABLES)}",
        )
    open_regular(path).close()  # a named pipe would be waited for
    if suffix == ".parquet":
        return _read_parquet(path, wanted)
    if suffix in (".csv", ".tsv"):
        return _read_delimited(path, "," if suffix == ".csv" else "\t")
    return _read_json_lines(path, wanted)


def _table(path: Path, modalities: Sequence[str]) -> Pairs:
    """The rows of a table file, not yet checked. Cells are stripped, and empty ones are holes."""
    names, records = _read_table(path, (*modalities, *_OPTIONAL))
    if not names:
        raise BridgekitError("the table is empty", where=str(path), remedy=FILL)
    _check_columns(names, modalities, str(path))
    if not records:
        raise BridgekitError("the table has a header and no rows", where=str(path), remedy="add a row for each pair")
    folder = path.parent.absolute()
    wanted = (*modalities, *_OPTIONAL)
    cells = {name: [record[at] for _, record in records] for at, name in enumerate(names) if name in wanted}
    columns: dict[str, tuple[Item | None, ...]] = {
        modality: tuple(cell if cell is None or modality == TEXT else folder / cell for cell in cells[modality])
        for modality in modalities
    }
    split, group = (tuple(cell or "" for cell in cells[name]) if name in cells else None for name in _OPTIONAL)
    return Pairs(columns, str(path), tuple(row for row, _ in records), split, group)


def _read_delimited(path: Path, delimiter: str) -> _Records:
    # The csv module, not pyarrow's reader: where a quote is never closed, pyarrow takes all rows after it for one cell and
    # says nothing. It is no slower either, as the cells are wanted as Python strings.
    csv.field_size_limit(MAX_ROW)
    reader = csv.reader(io.StringIO(_read_utf8(path), newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    records: list[tuple[int, list[str | None]]] = []
    row = 0
    try:
        for row, cells in enumerate(reader, 1):
            record = [cell.strip() or None for cell in cells]
            if not any(record):
                continue
            if not names:
                names = [name or "" for name in record]
            elif len(record) != len(names):
                raise BridgekitError(
                    f"the row has another number of cells ({len(record)}) than the header ({len(names)})",
                    where=f"{path}, row {row}",
                    remedy='put cells that contain commas, tabs or line breaks into "double quotes"',
                )
            else:
                records.append((row, record))
    except csv.Error as error:
        if "field limit" in str(error):
            raise BridgekitError(
                f"a cell has over {MAX_ROW:,} characters, or a quote before it is never closed",
                where=f"{path}, row {row + 1}",
                remedy='shorten the cell, and look for a stray double quote (")',
            ) from None
        reason = 'a double quote (") is never closed' if "end of data" in str(error) else f"the row is malformed ({error})"
        raise BridgekitError(
            reason, where=f"{path}, row {row + 1}", remedy='put the cell into "double quotes" and double those inside it ("")'
        ) from None
    return names, records


def _read_json_lines(path: Path, wanted: Sequence[str]) -> _Records:
    rows: list[tuple[int, dict[str, Any]]] = []
    for row, line in enumerate(_read_utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line, limit=MAX_ROW, lenient=True)
        except OutOfBounds as error:
            raise BridgekitError(
                f"the row cannot be used: {error}", where=f"{path}, row {row}", remedy="write one small JSON object a line"
            ) from None
        except ValueError as error:
            reason = why_no_json(error)
            raise BridgekitError(
                f"the row is not JSON ({reason})", where=f"{path}, row {row}", remedy="write one JSON object a line"
            ) from None
        if not isinstance(value, dict):
            raise BridgekitError(
                "the row is JSON but no object",
                where=f"{path}, row {row}",
                remedy='write one JSON object a line, like {"audio": "a.wav", "text": "a dog barks"}',
            )
        rows.append((row, value))
    names = dict.fromkeys(name for _, value in rows for name in value)
    # The wanted ones first, and cells of these alone: rows that all have other keys would make n columns of n cells.
    used = [name for name in names if name in wanted]
    cells = [(row, [_as_cell(value.get(name), f"{path}, row {row}") for name in used]) for row, value in rows]
    return [*used, *(name for name in names if name not in wanted)], cells


def _read_parquet(path: Path, wanted: Sequence[str]) -> _Records:
    names: list[str] = []
    cells: dict[str, list[str | None]] = {}

    def gather(told: Mapping[str, Any], lines: memoryview) -> None:
        names.extend(told["names"])
        for line in io.BytesIO(lines):
            for name, values in json.loads(line).items():
                known = cells.setdefault(name, [])
                known += [
                    _as_cell(value, f"{path}, row {row}, column {name}") for row, value in enumerate(values, len(known) + 1)
                ]

    if path.is_file() and not path.stat().st_size:
        raise BridgekitError("the table is empty", where=str(path), remedy=FILL)
    try:
        decode("parquet", path, gather, remedy="write it anew", wanted=list(wanted))
    except ItemError as error:
        raise BridgekitError(error.what, where=error.where, remedy=error.remedy) from None
    count = max(map(len, cells.values()), default=0)
    return names, [(row + 1, [cells[name][row] if name in cells else None for name in names]) for row in range(count)]


def _as_cell(value: Any, where: str) -> str | None:
    """A value of JSON or Parquet as the text that it would be in a CSV. Missing values are None."""
    if value is None or value != value:
        return None
    if isinstance(value, str | int | float):
        return str(value).strip() or None
    raise BridgekitError(
        f"the cell holds no text but a value of type {type(value).__name__}",
        where=where,
        remedy="give a text, or the path of a file",
    )


def _read_utf8(path: Path) -> str:
    data = read_bounded(path, MAX_TABLE)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n" if b"\n" in data else b"\r", 0, error.start) + 1
        raise BridgekitError(
            "the table is not in UTF-8", where=f"{path}, row {row}", remedy="save the table as UTF-8"
        ) from None


def _check_columns(names: Sequence[str], wanted: Sequence[str], where: str) -> None:
    """Refuse a table that lacks a column, and name the column that was probably meant."""
    for modality in wanted:
        if names.count(modality) > 1:
            raise BridgekitError(
                f"the table has more than one column `{modality}`", where=where, remedy="rename the header of all but one"
            )
        if modality in names:
            continue
        lowered = {name.lower(): name for name in names[:MANY] if len(name) < 100}
        close = difflib.get_close_matches(modality, lowered, n=1)
        if len(names) == 1 and any(mark in names[0] for mark in ",;\t|"):
            remedy = "separate the cells with commas (.csv) or tabs (.tsv)"
        elif any("\0" in name for name in names):
            remedy = "save the table as UTF-8: it holds NUL bytes, as a text in UTF-16 does"
        elif close:
            remedy = f"rename the header `{lowered[close[0]]}` to `{modality}`"
        else:
            remedy = f"rename the header of the column that holds {modality} to `{modality}`"
        what = f"the table has no column `{modality}`; its columns are {told_columns(names)}"
        raise BridgekitError(what, where=where, remedy=remedy)


def told_columns(names: Sequence[str]) -> str:
    """Names of columns as a message tells them: the first of many, and of a long one its beginning."""
    found = ", ".join(f"`{plain(name)[:60]}`" for name in names[:SHOWN])
    return found + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def _class_folders(folder: Path, modalities: Sequence[str]) -> Pairs:
    """A row for each file of each folder in a folder: the file, and the folder's name as its text."""
    files = [modality for modality in modalities if modality != TEXT]
    if TEXT not in modalities or len(files) != 1:
        raise BridgekitError(
            f"a folder of class folders pairs {TEXT} with one other modality, not {' with '.join(modalities)}",
            where=str(folder),
            remedy=f"give a table ({', '.join(_TABLES)}) with a column for each",
        )
    extensions = EXTENSIONS.get(files[0])
    items: list[Item | None] = []
    texts: list[Item | None] = []
    for label in sorted(entry for entry in folder.absolute().iterdir() if entry.is_dir() and entry.name[0] != "."):
        for file in sorted(label.iterdir()):
            if file.name[0] != "." and (extensions is None or file.suffix[1:].lower() in extensions):
                items.append(file)
                texts.append(" ".join(label.name.replace("_", " ").replace("-", " ").split()) or None)
    if not items:
        raise BridgekitError(
            f"there are no class folders with {files[0]} files in the folder",
            where=str(folder),
            remedy=f"arrange the files as FOLDER/name_of_class/file, or give a table ({', '.join(_TABLES)})",
        )
    columns = {modality: tuple(texts if modality == TEXT else items) for modality in modalities}
    return Pairs(columns, str(folder), tuple(range(1, len(items) + 1)))


class Home:
    """The folder that a table's files must lie in, all links followed.

    Real folders are looked up once each: a table may name a million files in a few of them.
    """

    def __init__(self, folder: Path) -> None:
        self._places = homes(folder)
        self._known: dict[str, bool] = {}

    def holds(self, file: Path) -> bool:
        """Whether the file, or where it would be, is in it."""
        parent, name = os.path.split(file)
        if name in ("", ".", "..") or file.is_symlink():
            return is_within(file, self._places)
        if parent not in self._known:
            self._known[parent] = is_within(parent, self._places)
        return self._known[parent]


def _usable(pairs: Pairs, modalities: Sequence[str], folder: Path | None = None) -> Pairs:
    """The rows of a table that can be used, in these columns only; the others join its `set_aside`.

    Arguments:
        pairs: the table.
        modalities: the columns.
        folder: where its files must lie, if anywhere.
    """
    home = Home(folder) if folder is not None else None
    columns = {modality: pairs.columns[modality] for modality in modalities}
    kept: list[int] = []
    set_aside = list(pairs.set_aside)
    first: dict[tuple[Item | None, ...], int] = {}
    for index, (row, items) in enumerate(zip(pairs.rows, zip(*columns.values(), strict=True), strict=True)):
        fault = _fault(dict(zip(modalities, items, strict=True)), home)
        if fault is None and items in first:
            other = first[items]
            leak = pairs.split is not None and _split_name(pairs.split[index]) != _split_name(pairs.split[other])
            fault = (modalities[0], f"the same as row {pairs.rows[other]}{', of another split' if leak else ''}")
        if fault is None:
            first[items] = index
            kept.append(index)
        else:
            column, reason = fault
            set_aside.append(SetAside(row, column, str(columns[column][index] or "")[:200], reason))
    if not kept:
        why = f" (row {set_aside[0].row}: {set_aside[0].reason}: {set_aside[0].item})" if set_aside else ""
        remedy = "mend the table; paths in it are relative to its own folder"
        if set_aside and set_aside[0].reason == LEAVES:
            remedy = (
                "move the files into the table's folder or, if you trust the table, add --outside (in Python: outside=True)"
            )
        raise BridgekitError(
            f"none of the {len(set_aside):,} rows can be used{why}",
            where=pairs.source,
            remedy=remedy,
        )
    split = pairs.split if pairs.split and any(pairs.split) else None
    group = pairs.group if pairs.group and any(pairs.group) else None
    named = None if split is None else tuple(_split_name(cell) for cell in split)
    return Pairs(columns, pairs.source, pairs.rows, named, group, tuple(set_aside)).take(kept)


def _fault(items: Mapping[str, Item | None], home: Home | None) -> tuple[str, str] | None:
    """The column and the reason why a row cannot be used, or None."""
    holes = [modality for modality, item in items.items() if item is None]
    if len(items) - len(holes) < min(2, len(items)):
        return holes[0], f"no item in this column, and a pair needs two of {', '.join(items)}"
    for modality, item in items.items():
        if not isinstance(item, Path):
            continue
        try:
            if home and not home.holds(item):
                return modality, LEAVES
            status = item.stat()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            reason = getattr(error, "strerror", None) or "its name holds NUL bytes or broken characters"
            return modality, "there is no such file" if missing else f"the file cannot be read ({reason})"
        if not stat.S_ISREG(status.st_mode):
            return modality, "this is a folder, or something else that is no file"
        if not status.st_size:
            return modality, "the file is empty (0 bytes)"
    return None


# ---- splits and relations


def split_pairs(pairs: Pairs, seed: int, content: Content) -> tuple[str, ...]:
    """Say which rows to train on, which to validate on, and which to test on.

    A table's own split is kept. Without one, rows go to train, val and test as 80 : 10 : 10. Rows that share a file or a
    group stay together, so that nothing tested on was trained on; a text may repeat across splits, as names of classes do.
    A table with a train split and no val split has a tenth of its train rows moved to val, by the same rule.

    Arguments:
        pairs: the table, n rows.
        seed: of the random choice. The same seed gives the same splits.
        content: modality to n ids: rows with the same id hold the same item. Negative for a hole.

    Returns:
        n names: `train`, `val`, and any other name for a test split.

    Raises:
        BridgekitError: fewer than 10 rows, no train split, or so much in common between rows that they cannot be split.
    """
    count = len(pairs)
    if count < MIN_ROWS:
        rows = "1 row is" if count == 1 else f"{count} rows are"
        remedy = "add pairs"
        if pairs.set_aside:
            first = pairs.set_aside[0]
            remedy += f"; {len(pairs.set_aside)} set aside, the first in row {first.row}: {first.reason}"
        raise BridgekitError(
            f"{rows} too few to learn from: give at least {MIN_ROWS}; a few hundred give something worth having",
            where=pairs.source,
            remedy=remedy,
        )
    names = ["train"] * count if pairs.split is None else [_split_name(name) for name in pairs.split]
    if "train" not in names:
        raise BridgekitError(
            f"no row is in the train split; the splits are {', '.join(dict.fromkeys(names))}",
            where=pairs.source,
            remedy="write `train` in the column `split` of the rows to learn from, or leave the column out",
        )
    if "val" in names:
        return tuple(names)
    free = [row for row in range(count) if names[row] == "train"]
    wanted = ("val", "test") if pairs.split is None else ("val",)
    pieces = _components(pairs, content, free)
    if len(pieces) <= len(wanted):
        raise BridgekitError(
            f"the rows to learn from cannot be divided into train, {' and '.join(wanted)}: they share files or groups",
            where=pairs.source,
            remedy="give a column `split`, or more rows that have nothing in common with these",
        )
    order = np.random.default_rng(seed).permutation(len(pieces)).tolist()
    # A target of no more than its share of what is not in the largest piece leaves something for each split.
    largest = max(len(piece) for piece in pieces)
    target = max(1, min(round(len(free) / 10), (len(free) - largest) // len(wanted)))
    for name in wanted:
        room = target
        chosen = []
        for piece in order:
            if len(pieces[piece]) <= room:
                chosen.append(piece)
                room -= len(pieces[piece])
        # Where all pieces are larger than the split is meant to be, the smallest does the least harm.
        chosen = chosen or [min(order, key=lambda piece: len(pieces[piece]))]
        taken = set(chosen)
        order = [piece for piece in order if piece not in taken]
        for piece in chosen:
            for row in pieces[piece]:
                names[row] = name
    return tuple(names)


def relation_keys(pairs: Pairs, content: Content) -> npt.NDArray[np.int64]:
    """What makes two rows related, so that neither is ever the other's negative: the same item, or the same group.

    Arguments:
        pairs: the table, n rows.
        content: modality to n ids: rows with the same id hold the same item. Negative for a hole.

    Returns:
        int64 of shape (n, k): a column for each modality, in the table's order, and a last one if it has groups. Two rows
        are related where any column holds the same id, not negative, for both. An id means nothing in another column.
    """
    columns = [np.asarray(content[modality], np.int64) for modality in pairs.modalities]
    if pairs.group is not None:
        columns.append(np.asarray(_group_ids(pairs.group), np.int64))
    return np.stack(columns, axis=1)


def _group_ids(group: Sequence[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) if name else -1 for name in group]


def _components(pairs: Pairs, content: Content, rows: Sequence[int]) -> list[list[int]]:
    """These rows in pieces: two rows are in one piece if a chain of shared files or groups leads from one to the other."""
    links = [content[modality] for modality in pairs.modalities if modality != TEXT]
    if pairs.group is not None:
        links.append(_group_ids(pairs.group))
    parent = {row: row for row in rows}

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for ids in links:
        seen: dict[int, int] = {}
        for row in rows:
            if (number := int(ids[row])) >= 0:
                parent[root(row)] = root(seen.setdefault(number, row))
    pieces: dict[int, list[int]] = {}
    for row in rows:
        pieces.setdefault(root(row), []).append(row)
    return list(pieces.values())


def _split_name(cell: str) -> str:
    name = cell.strip().lower()
    if name in ("", *_TRAIN):
        return "train"
    return "val" if name in _VAL else name
