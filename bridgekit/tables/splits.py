"""Which rows to train, validate and test on, and which rows are related."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.pairs import Column, Content, Pairs

MIN_ROWS = 10  # to train at all, with at least one row each for validation and test


def split_pairs(pairs: Pairs, seed: int, content: Content) -> tuple[str, ...]:
    """Split rows into train, val and test.

    A table's own split is kept. Without one, rows go to train, val and test as 80 : 10 : 10. Rows that share a file or a
    group stay together, so that no test item was trained on; texts may repeat across splits, as class names do. If a table
    has a train split but no val split, a tenth of the train rows become val, by the same rule.

    Returns:
        a name for each row: `train`, `val`, or any other for a test split. The same random seed gives the same splits.

    Raises:
        BridgekitError: there are fewer than 10 rows, no row to train on, or rows share so much that they cannot be split.
    """
    count = len(pairs)
    if count < MIN_ROWS:
        rows = "1 row is" if count == 1 else f"{count} rows are"
        remedy = "add pairs"
        if pairs.set_aside:
            first = pairs.set_aside[0]
            remedy += f"; {len(pairs.set_aside)} were set aside, the first in row {first.row}: {first.reason}"
        raise BridgekitError(
            f"{rows} too few to train on: at least {MIN_ROWS} are needed, and useful results take a few hundred",
            where=pairs.source,
            remedy=remedy,
        )
    names = ["train"] * count if pairs.split is None else list(Column.of(pairs.split).map(split_name))
    if "train" not in names:
        raise BridgekitError(
            f"no row is in the train split; the splits are {', '.join(dict.fromkeys(names))}",
            where=pairs.source,
            remedy="write `train` in the column `split` of the rows to train on, or leave the column out",
        )
    if "val" in names:
        return tuple(names)
    free = np.fromiter((row for row, name in enumerate(names) if name == "train"), np.int64)
    wanted = ("val", "test") if pairs.split is None else ("val",)
    order, sizes = _components(pairs, content, free)
    if len(sizes) <= len(wanted):
        raise BridgekitError(
            f"the rows to train on cannot be split into train, {' and '.join(wanted)}: they share files or groups",
            where=pairs.source,
            remedy="add a column `split`, or rows that share no file or group with these",
        )
    starts = np.cumsum(sizes) - sizes
    waiting = np.random.default_rng(seed).permutation(len(sizes))
    # A target of at most a split's share of the rows outside the largest component leaves rows for every split.
    target = max(1, min(round(len(free) / 10), (len(free) - int(sizes.max())) // len(wanted)))
    for name in wanted:
        room = target
        chosen = []
        for at, size in zip(waiting.tolist(), sizes[waiting].tolist(), strict=True):
            if size <= room:
                chosen.append(at)
                room -= size
                if not room:
                    break
        # Where every component is larger than the target, the smallest is closest to it.
        chosen = chosen or [int(waiting[np.argmin(sizes[waiting])])]
        waiting = waiting[~np.isin(waiting, chosen)]
        for at in chosen:
            for row in order[starts[at] : starts[at] + sizes[at]].tolist():
                names[row] = name
    return tuple(names)


def draw_folds(
    pairs: Pairs, content: Content, rows: npt.NDArray[np.int64], count: int, seed: int
) -> list[npt.NDArray[np.int64]]:
    """Cut rows into folds of about the same size for cross-validation. Rows that share a file or a group stay together.

    Returns:
        up to `count` arrays of rows, fewer if the rows share too much.
    """
    order, sizes = _components(pairs, content, rows)
    ends = np.cumsum(sizes)
    parts = np.split(order, ends[:-1])
    folds: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(count)]
    room = np.zeros(count, np.int64)
    for at in np.random.default_rng(seed).permutation(len(parts)).tolist():
        smallest = int(room.argmin())
        folds[smallest].append(parts[at])
        room[smallest] += len(parts[at])
    return [np.sort(np.concatenate(fold)) for fold in folds if fold]


def relation_keys(pairs: Pairs, content: Content) -> npt.NDArray[np.int64]:
    """Keys that related rows share: the same item or group. Related rows are never used as each other's negatives.

    Returns:
        int64 of shape (n, k): a column for each modality, in the table's order, and a last one if it has groups. Two rows
        are related if any column has the same non-negative id for both.
    """
    columns = [np.asarray(content[modality], np.int64) for modality in pairs.modalities]
    if pairs.group is not None:
        columns.append(np.asarray(_group_ids(pairs.group), np.int64))
    return np.stack(columns, axis=1)


def _group_ids(group: Sequence[str]) -> npt.NDArray[np.int64]:
    column = Column.of(group)
    named = np.array([bool(value) for value in column.map(str).values] or [False])
    return np.where((column.codes >= 0) & named[column.codes], column.codes, -1)


def _components(
    pairs: Pairs, content: Content, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Connected components of these rows: rows that share a file or a group are connected.

    Returns:
        the rows, sorted by component; and the components' sizes, in order of their first rows.
    """
    links = [np.asarray(content[modality])[rows] for modality in pairs.modalities if modality != TEXT]
    if pairs.group is not None:
        links.append(_group_ids(pairs.group)[rows])
    label = np.arange(len(rows))
    if len(links) == 1:
        label = _first_with(links[0])
    elif links:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        ends = np.tile(label, len(links)), np.concatenate([_first_with(ids) for ids in links])
        graph = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(len(rows), len(rows)))
        label = connected_components(graph, directed=False)[1]
    _, first, place = np.unique(label, return_index=True, return_inverse=True)
    number = np.argsort(np.argsort(first))[place]  # by first rows
    return rows[np.argsort(number, kind="stable")], np.bincount(number)


def _first_with(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each row the first with the same id; itself if the id is negative."""
    _, first, place = np.unique(ids, return_index=True, return_inverse=True)
    return np.where(ids < 0, np.arange(len(ids)), first[place])


def split_name(cell: str) -> str:
    """The canonical name of a split: `train`, `val`, or as the table has it."""
    name = cell.strip().lower()
    if name in ("", "train", "training"):
        return "train"
    return "val" if name in ("val", "valid", "validation", "dev") else name


def count_rows(split: npt.NDArray[np.str_]) -> dict[str, int]:
    """Split to its number of rows: train, val, then the others in the table's order."""
    return {name: int((split == name).sum()) for name in dict.fromkeys((*NOT_TESTS, *split.tolist())) if name in split}


#: Splits that metrics are not reported on.
NOT_TESTS = ("train", "val")


def test_splits(split: Sequence[str]) -> list[str]:
    """The names of the splits that metrics are reported on, in the table's order."""
    return [name for name in dict.fromkeys(split) if name not in NOT_TESTS]
