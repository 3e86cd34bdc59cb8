"""Folders as tables, by the conventions of public data sets.

In this order:
- what `datasets` saved with `save_to_disk`: `state.json` lists its Arrow files; `dataset_dict.json` names a folder per split;
- `metadata.csv`, `.jsonl` or `.parquet` beside the files, as in `imagefolder` and `audiofolder`;
- Parquet or Arrow files alone, in the folder or below it, as on the hub;
- tables named after splits, as in `train.csv` and `test.csv`;
- a single table file, in the folder or in a folder beside those of the files;
- a text file beside each file: `x.png` and `x.txt`, with a text on each line;
- class folders, where there is no table: a folder's name is the text of all files in it.
Where folders or files are named after several splits, their rows belong to these splits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.pairs import EXTENSIONS, Column
from bridgekit.storage.bounded import read_bounded, read_json
from bridgekit.tables.formats import ARROW, TABLES, Cells, Records, read_records

SIDECAR = ".txt"
MAX_SIDECAR = 1 << 20  # bytes
MAX_STATE = 16 << 20  # bytes of the JSON files of `save_to_disk`
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval")
_FILES = {extension for extensions in EXTENSIONS.values() for extension in extensions}


def read_folder(folder: Path, links: bool) -> Records | None:
    """The table in a folder; None if it has none, only files.

    Arguments:
        folder: the folder.
        links: follow links to other folders.

    Raises:
        BridgekitError: the table is malformed.
    """
    where = folder.absolute()
    parts = _saved(where) or _with_metadata(where) or _arrow_files(where, links)
    if parts:
        return joined([(read_records(file), file.parent, split) for file, split in parts])
    # A table in a folder beside those of the files, such as `meta`, names files relative to the folder of both.
    below = [part for place in _folders(where) for part in _single_table(place)]
    parts = _by_split(where) or _single_table(where) or (below if len(below) == 1 else [])
    return joined([(read_records(file), where, split) for file, split in parts]) if parts else None


# ---- tables in folders


def _saved(folder: Path) -> list[tuple[Path, str | None]]:
    """The Arrow files of `save_to_disk`, with their splits."""
    if (folder / "dataset_dict.json").is_file():
        splits = _listed(folder / "dataset_dict.json", "splits")
        return [(file, str(name)) for name in splits for file, _ in _saved(folder / _plain_name(folder, name))]
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return []
    files = _listed(folder / "state.json", "_data_files")
    return [(folder / _plain_name(folder, each.get("filename") if isinstance(each, dict) else each), None) for each in files]


def _listed(path: Path, key: str) -> list[Any]:
    """A list in one of the JSON files of `save_to_disk`."""
    again = "save the data set again"
    try:
        value = read_json(path, MAX_STATE)
    except (OSError, ValueError) as error:
        raise BridgekitError(f"the file cannot be read ({error})", where=str(path), remedy=again) from None
    listed = value.get(key) if isinstance(value, dict) else None
    if not isinstance(listed, list) or not listed or not all(isinstance(each, str | dict) for each in listed):
        raise BridgekitError(f"the file has no list of `{key}`", where=str(path), remedy=again)
    return listed


def _plain_name(folder: Path, name: object) -> str:
    """The name of a file or folder in `folder`, as a file there gives it."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise BridgekitError(f"{str(name)[:100]!r} is not a file name", where=str(folder), remedy="save the data set again")
    return name


def _with_metadata(folder: Path) -> list[tuple[Path, str | None]]:
    names = [f"metadata{ending}" for ending in TABLES]
    own: list[tuple[Path, str | None]] = [(folder / name, None) for name in names if (folder / name).is_file()]
    below = [(place / name, place.name) for place in _split_folders(folder) for name in names if (place / name).is_file()]
    return own or [*below]


def _arrow_files(folder: Path, links: bool) -> list[tuple[Path, str | None]]:
    files = [Path(file) for file in walk(folder, links) if file.lower().endswith(ARROW)]
    if len(files) < 2 or any(
        Path(file).suffix.lower() not in ARROW for file in _visible(folder) if file.is_file() and _is_data(file)
    ):
        return []
    return [(file, _split_of(file, folder)) for file in files]


def _is_data(file: Path) -> bool:
    return file.suffix.lower() in TABLES or file.suffix[1:].lower() in _FILES


def _split_of(file: Path, folder: Path) -> str | None:
    """The split in a file's name, as in `train-00000-of-00002.parquet`, or of its folder."""
    named = re.match(r"[A-Za-z]+", file.name)
    for name in (named[0] if named else "", *file.relative_to(folder).parts[:-1]):
        if name.lower() in _SPLITS:
            return name
    return None


def _by_split(folder: Path) -> list[tuple[Path, str | None]]:
    """Tables that are named after splits."""
    return [(file, file.stem) for file in _tables(folder) if file.stem.lower() in _SPLITS]


def _single_table(folder: Path) -> list[tuple[Path, str | None]]:
    tables = _tables(folder)
    return [(tables[0], None)] if len(tables) == 1 else []


def _tables(folder: Path) -> list[Path]:
    return [file for file in _visible(folder) if file.suffix.lower() in TABLES and file.is_file()]


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in _visible(folder) if entry.is_dir() and not entry.is_symlink()]


def joined(parts: Sequence[tuple[Records, Path, str | None]]) -> Records:
    """One table of several with the same columns. Paths become absolute; a split in names is a column."""
    tables, folders, splits = zip(*parts, strict=True)
    names = list(dict.fromkeys(name for table in tables for name in table.names))
    for table, folder in zip(tables, folders, strict=True):
        if missing := [name for name in names if name not in table.names]:
            raise BridgekitError(f"this part of the table has no column `{missing[0]}`", where=str(folder), remedy="add it")
    counts = [len(table.rows) for table in tables]
    by_split: Column[str] | None = None
    if "split" not in names and len({*splits}) > 1:
        by_split = Column([split or "train" for split in splits], np.repeat(np.arange(len(parts)), counts))
    elif "split" not in names and "file_name" in names:
        by_split = _splits_of_paths(Column.joined([table.column("file_name").column for table in tables]))

    @cache
    def column(name: str) -> Cells:
        if by_split is not None and name == "split":
            return Cells(by_split)
        cells = [table.column(name) for table in tables]
        if all(each.rows is None for each in cells):
            return Cells(Column.joined([each.column for each in cells]))
        starts = np.cumsum([0, *counts[:-1]])
        rows = [
            start + (np.arange(count) if each.rows is None else each.rows)
            for each, start, count in zip(cells, starts, counts, strict=True)
        ]
        return Cells(Column.joined([each.column for each in cells]), np.concatenate(rows))

    numbers = tables[0].rows if len(tables) == 1 else range(1, sum(counts) + 1)
    bases = Column.of(folders)
    bases = Column(bases.values, np.repeat(bases.codes, counts))
    return Records([*names, *(["split"] if by_split is not None else [])], numbers, column, tables[0].features, bases)


def _splits_of_paths(names: Column[str]) -> Column[str] | None:
    """The splits that paths such as `train/0001.png` begin with, if all do and there are several."""
    found = names.map(lambda name: str(name).partition("/")[0])
    distinct = {*map(str, found.values)}
    return found if len(distinct) > 1 and all(name.lower() in _SPLITS for name in distinct) else None


# ---- files in folders


def read_files(folder: Path, links: bool, modality: str | None = None) -> Records:
    """The files in a folder with the texts beside them, or else those in class folders.

    Arguments:
        folder: the folder.
        links: follow links to other folders.
        modality: the files' modality; by default that of most files.

    Raises:
        BridgekitError: there are none.
    """
    where = folder.absolute()
    files = [Path(file) for file in walk(where, links)]
    modality = modality or _most(files)
    endings = EXTENSIONS.get(modality)
    data = [file for file in files if file.suffix != SIDECAR and (endings is None or file.suffix[1:].lower() in endings)]
    texts = {file.with_suffix("") for file in files if file.suffix.lower() == SIDECAR}
    rows: list[tuple[Path | None, str | None]]
    if any(file.with_suffix("") in texts for file in data):
        above = 1
        rows = [(file, text) for file in data for text in _sidecar(file.with_suffix(SIDECAR))]
        alone = texts - {file.with_suffix("") for file in data}
        rows += [(None, text) for stem in sorted(alone) for text in _sidecar(stem.with_suffix(SIDECAR))[:1]]
    else:
        _refuse_tables(folder, files)
        above = 2
        rows = [(file, class_name(file.parent.name)) for file in data if _in_class_folder(file, where)]
    if not rows:
        what = f"the folder has no class folders with {modality} files, no texts beside such files, and no table"
        raise BridgekitError(
            what if files else "the folder is empty",
            where=str(folder),
            remedy=f"arrange the files as FOLDER/class_name/file, or give a table ({', '.join(TABLES)})",
        )
    places, cells = [file for file, _ in rows], [text for _, text in rows]
    columns: dict[str, Column[Any]] = {modality: Column.of(places), TEXT: Column.of(cells)}
    splits = [_split_above(file, where, above) for file in places]
    if len({*splits}) > 1:
        columns["split"] = Column.of(split or "train" for split in splits)
    return Records(list(columns), range(1, len(rows) + 1), lambda name: Cells(columns[name]))


def _split_above(file: Path | None, folder: Path, above: int) -> str | None:
    """The split that a folder above a file is named after, at least so many levels up."""
    parts = file.relative_to(folder).parts[:-above] if file else ()
    return next((part for part in parts if part.lower() in _SPLITS), None)


def _most(files: Sequence[Path]) -> str:
    """The modality that most files have by their extension."""
    endings = [file.suffix[1:].lower() for file in files]
    count = {modality: sum(ending in known for ending in endings) for modality, known in EXTENSIONS.items()}
    return max(count, key=lambda name: count[name])


def _in_class_folder(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts[:-1]
    return len(parts) == 1 or (len(parts) == 2 and parts[0].lower() in _SPLITS)


def _split_folders(folder: Path) -> list[Path]:
    return [entry for entry in _visible(folder) if entry.name.lower() in _SPLITS and entry.is_dir()]


def _sidecar(path: Path) -> list[str | None]:
    """The texts in a file, one on each line; a missing one if it cannot be read: its row is set aside."""
    try:
        lines = read_bounded(path, MAX_SIDECAR).decode("utf-8-sig").split("\n")
    except (OSError, ValueError):
        return [None]
    return [line.strip() for line in lines if line.strip()] or [None]


def _refuse_tables(folder: Path, files: Sequence[Path]) -> None:
    """Raise BridgekitError if files beside class folders seem to have the texts: the folders may be no classes."""
    shards = [file for file in files if file.suffix == ".tar"]
    if shards:
        remedy = f"give them as --pairs 'webdataset:{folder}/*.tar' (plugins/bridgekit-datasets)"
        raise BridgekitError("the folder has tar files", where=str(folder), remedy=remedy)
    with_data = {file.parent for file in files if file.suffix[1:].lower() in _FILES}
    tables = [file for file in files if file.suffix.lower() in TABLES and file.parent not in with_data]
    if tables:
        found = ", ".join(str(file.relative_to(folder.absolute())) for file in tables[:5])
        raise BridgekitError(
            f"the folder has {'several tables' if len(tables) > 1 else 'a table'} beside its files: {found}",
            where=str(folder),
            remedy=f"give one as --pairs, for example --pairs {folder / tables[0].relative_to(folder.absolute())}",
        )


def class_name(name: str) -> str | None:
    """A class folder's name as a text."""
    return " ".join(name.replace("_", " ").replace("-", " ").split()) or None


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")


def walk(folder: Path, links: bool) -> Iterator[str]:
    """The files in a folder and below, sorted, without hidden ones. `links` follows links to folders, to each folder once."""
    been: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=links):
        real = os.path.realpath(place)
        if real in been:
            folders.clear()
            continue
        been.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        if not links:  # the files in a linked folder are listed, to be set aside; what is below it is not
            linked = [name for name in folders if os.path.islink(os.path.join(place, name))]  # noqa: PTH114, PTH118
            files += [os.path.join(name, file) for name in linked for file in _files_in(os.path.join(place, name))]  # noqa: PTH118
        yield from (os.path.join(place, name) for name in sorted(files) if name[0] != ".")  # noqa: PTH118  (faster for many)


def _files_in(folder: str) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder) if entry.is_file() and entry.name[0] != "."]
    except OSError:
        return []
