"""Which rows of a table can be used: those with two items, whose files exist where they may, and that repeat no other."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.pairs import Column, Pairs, SetAside
from bridgekit.storage.bounded import file_size, homes, is_within, unreadable
from bridgekit.tables.splits import split_name

LEAVES = "its path leads outside the table's folder: move the file there, or allow it with --outside"
URL = "URLs are not fetched: download the files and give their paths"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Home:
    """The folder that must contain a table's files after resolving links.

    Each parent folder is resolved only once: a table may refer to a million files in a few folders.
    """

    def __init__(self, folder: Path) -> None:
        self._places = homes(folder)
        self._parent_inside = cache(partial(is_within, places=self._places))

    def holds(self, file: str | Path, is_link: bool | None = None) -> bool:
        """Whether the file's path, existing or not, is inside the folder. `is_link` is given where it is known."""
        parent, name = os.path.split(file)
        if name in ("", ".", "..") or (Path(file).is_symlink() if is_link is None else is_link):
            return is_within(file, self._places)
        return self._parent_inside(parent)


def usable_rows(pairs: Pairs, modalities: Sequence[str], folder: Path | None) -> Pairs:
    """These columns of the usable rows, whose files must be in `folder` if given; the other rows are added to `set_aside`."""
    columns = {modality: pairs.column(modality) for modality in modalities}
    home = Home(folder) if folder is not None else None
    reasons = {modality: _faults(column, home) for modality, column in columns.items() if modality != TEXT}
    missing = {modality: column.codes < 0 for modality, column in columns.items()}
    too_few = len(columns) - sum(missing.values(), np.zeros(len(pairs), np.int64)) < min(2, len(columns))
    bad = too_few.copy()
    for modality, faults in reasons.items():
        if faults:
            bad |= np.isin(columns[modality].codes, list(faults))
    first = _first_of_equals(columns, np.flatnonzero(~bad))
    kept = np.flatnonzero(~bad & (first == np.arange(len(pairs))))
    left_out = _set_aside(pairs, columns, reasons, missing, too_few, first, np.setdiff1d(np.arange(len(pairs)), kept))
    if not len(kept):
        raise _no_row(pairs, next(left_out, None))
    split, group = _filled(pairs.split, split_name, "train"), _filled(pairs.group, str, "")
    whole = Pairs(columns, pairs.source, pairs.rows, split, group, (*pairs.set_aside, *left_out))
    return whole if len(kept) == len(pairs) else whole.take(kept)


def _filled(labels: Sequence[str] | None, change: Callable[[str], str], missing: str) -> Column[str] | None:
    """The labels of rows, changed, and with one for the rows that have none; None if no row has one."""
    if labels is None or not any(map((column := Column.of(labels)).value, _used(column))):
        return None
    changed = column.map(change)
    return Column([*changed.values, missing], np.where(changed.codes < 0, len(changed.values), changed.codes))


def _used(column: Column[Any]) -> list[int]:
    codes = np.unique(column.codes)
    return [int(code) for code in codes if code >= 0]


def _first_of_equals(columns: Mapping[str, Column[Any]], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row the first of those among `rows` with the same items; itself for others."""
    count = len(next(iter(columns.values())))
    key = np.zeros(len(rows), np.int64)
    for column in columns.values():
        codes = column.codes[rows].astype(np.int64) + 1
        size = int(codes.max(initial=0)) + 1
        if int(key.max(initial=0)) * size > np.iinfo(np.int64).max // 2:
            key = np.unique(key, return_inverse=True)[1]
        key = key * size + codes
    first = np.arange(count)
    _, at, place = np.unique(key, return_index=True, return_inverse=True)
    first[rows] = rows[at[place]]
    return first


def _set_aside(
    pairs: Pairs,
    columns: Mapping[str, Column[Any]],
    reasons: Mapping[str, Mapping[int, str]],
    missing: Mapping[str, NDArray[np.bool_]],
    too_few: NDArray[np.bool_],
    first: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> Iterator[SetAside]:
    """These rows with the reason of each.

    There may be millions, and most are alike: texts are made once for each item, and shared.
    """
    codes = {modality: column.codes[rows].tolist() for modality, column in columns.items()}
    unnamed = split_name("")
    splits = None if pairs.split is None else Column.of(pairs.split).map(split_name)
    shown = cache(partial(_shown, columns))
    same = cache("the same as row {}{}".format)
    for at, (row, lacking, other) in enumerate(zip(rows.tolist(), too_few[rows].tolist(), first[rows].tolist(), strict=True)):
        items = {modality: each[at] for modality, each in codes.items()}
        column = next((modality for modality, faults in reasons.items() if items[modality] in faults), None)
        if lacking:
            column = next(modality for modality in columns if missing[modality][row])
            reason = f"no item in this column, and a pair needs two of {', '.join(columns)}"
        elif column is not None:
            reason = reasons[column][items[column]]
        else:
            column = next(iter(columns))
            leak = splits is not None and (splits[row] or unnamed) != (splits[other] or unnamed)
            reason = same(pairs.rows[other], ", in another split" if leak else "")
        beside = next((modality for modality in columns if items[modality] >= 0), None) if items[column] < 0 else None
        yield SetAside(pairs.rows[row], column, shown(beside or column, items[beside or column], beside is not None), reason)


def _shown(columns: Mapping[str, Column[Any]], column: str, code: int, beside: bool) -> str:
    """The beginning of an item, as written if it is an address, or of what an item is missing beside."""
    if code < 0:
        return ""
    written = str(columns[column].values[code]) if columns[column].folder is not None else ""
    shown = written if _URL.match(written) else str(columns[column].value(code))
    return f"beside {shown}"[:200] if beside else shown[:200]


def _no_row(pairs: Pairs, first: SetAside | None) -> BridgekitError:
    first = pairs.set_aside[0] if pairs.set_aside else first
    why = f" (row {first.row}: {first.reason}: {first.item})" if first else ""
    remedy = "fix the table; its paths are relative to its own folder"
    if first and first.reason == URL:
        remedy = "download the files, and write their paths into the table"
    if first and first.reason == LEAVES:
        remedy = "move the files into the table's folder, or if you trust it, add --outside (in Python: outside=True)"
    count = len(pairs) + len(pairs.set_aside)
    return BridgekitError(f"none of the {count:,} rows is usable{why}", where=pairs.source, remedy=remedy)


# ---- files


def _faults(column: Column[Any], home: Home | None) -> dict[int, str]:
    """The codes of a column's files that cannot be used, with the reason of each."""
    if column.folder is not None:
        return dict(_faulty_paths(column, home))
    items = ((code, column.value(code)) for code in _used(column))
    return {code: why for code, item in items if isinstance(item, Path) and (why := _fault(item, home)) is not None}


def _faulty_paths(column: Column[Any], home: Home | None) -> Iterator[tuple[int, str]]:
    """The same for paths in a folder, of which there may be millions: one system call for each that is fine."""
    assert column.folder is not None
    used = np.zeros(len(column.values), bool)
    used[column.codes[column.codes >= 0]] = True
    base = str(column.folder)
    values = column.values
    for start in range(0, len(values), 1 << 16):
        part = values[start : start + (1 << 16)]
        for code, value in enumerate(part.to_pylist() if hasattr(part, "to_pylist") else part, start):
            if not used[code]:
                continue
            path = os.path.join(base, value)  # noqa: PTH118  (pathlib takes five times as long)
            try:
                status = os.lstat(path)
                if stat.S_ISREG(status.st_mode) and status.st_size and (home is None or home.holds(path, is_link=False)):
                    continue
            except (OSError, ValueError):
                pass
            if (why := _fault(column.folder / value, home, value)) is not None:
                yield code, why


def _fault(file: Path, home: Home | None, cell: str = "") -> str | None:
    """Why a file cannot be used, or None."""
    if _URL.match(cell):
        return URL
    try:
        if home and not home.holds(file):
            return LEAVES
        file_size(file)
    except ItemError as error:
        return error.what
    except (OSError, ValueError) as error:  # from `holds`, for an invalid name
        return unreadable(file, error).what
    return None
