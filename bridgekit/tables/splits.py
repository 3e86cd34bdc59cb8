"""Splitting rows into train, validation and test, and finding related rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.pairs import Content, Pairs

MIN_ROWS = 10  # enough to leave one row each for validation and test

_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "dev")


def split_pairs(pairs: Pairs, seed: int, content: Content) -> tuple[str, ...]:
    """Assign each row to train, validation or test.

    A table's own split is kept. Without one, rows are split 80:10:10. Rows that share a file or a group stay together, so no
    test item is seen in training; texts, such as class names, may repeat across splits. If a table has a train split but no
    val split, a tenth of its train rows moves to val, by the same rule.

    Arguments:
        pairs: the table, n rows.
        seed: random seed.
        content: modality to n ids: rows with the same id hold the same item. Negative if missing.

    Returns:
        n split names: `train`, `val`; any other is a test split.

    Raises:
        BridgekitError: there are fewer than 10 rows or none to train on, or too many rows share files or groups.
    """
    count = len(pairs)
    if count < MIN_ROWS:
        rows = "1 usable row is" if count == 1 else f"{count} usable rows are"
        remedy = "add pairs: useful results take a few hundred"
        if pairs.set_aside:
            first = pairs.set_aside[0]
            remedy += f"; {len(pairs.set_aside)} rows were set aside, the first is row {first.row}: {first.reason}"
        raise BridgekitError(f"{rows} not enough to train on; the minimum is {MIN_ROWS}", where=pairs.source, remedy=remedy)
    names = ["train"] * count if pairs.split is None else [split_name(name) for name in pairs.split]
    if "train" not in names:
        raise BridgekitError(
            f"no row is in the train split; the splits are {', '.join(dict.fromkeys(names))}",
            where=pairs.source,
            remedy="put `train` in the `split` column of the rows to train on, or remove the column",
        )
    if "val" in names:
        return tuple(names)
    free = [row for row in range(count) if names[row] == "train"]
    wanted = ("val", "test") if pairs.split is None else ("val",)
    pieces = _components(pairs, content, free)
    if len(pieces) <= len(wanted):
        raise BridgekitError(
            f"cannot split the rows into train, {' and '.join(wanted)}: too many share files or groups",
            where=pairs.source,
            remedy="add a `split` column, or rows with other files and groups",
        )
    order = np.random.default_rng(seed).permutation(len(pieces)).tolist()
    # Capped at an equal share of the rows outside the largest component, so that every split gets some.
    largest = max(len(piece) for piece in pieces)
    target = max(1, min(round(len(free) / 10), (len(free) - largest) // len(wanted)))
    for name in wanted:
        room = target
        chosen = []
        for piece in order:
            if len(pieces[piece]) <= room:
                chosen.append(piece)
                room -= len(pieces[piece])
        # If every component is larger than the target, take the smallest.
        chosen = chosen or [min(order, key=lambda piece: len(pieces[piece]))]
        taken = set(chosen)
        order = [piece for piece in order if piece not in taken]
        for piece in chosen:
            for row in pieces[piece]:
                names[row] = name
    return tuple(names)


def relation_keys(pairs: Pairs, content: Content) -> npt.NDArray[np.int64]:
    """Keys of related rows, which share an item or a group and so must not be each other's negatives.

    Arguments:
        pairs: the table, n rows.
        content: modality to n ids: rows with the same id hold the same item. Negative if missing.

    Returns:
        int64 of shape (n, k): one column per modality, in the table's order, and a last one if it has groups. Two rows are
        related if they have the same non-negative id in any column. Ids of different columns are unrelated.
    """
    columns = [np.asarray(content[modality], np.int64) for modality in pairs.modalities]
    if pairs.group is not None:
        columns.append(np.asarray(_group_ids(pairs.group), np.int64))
    return np.stack(columns, axis=1)


def _group_ids(group: Sequence[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) if name else -1 for name in group]


def _components(pairs: Pairs, content: Content, rows: Sequence[int]) -> list[list[int]]:
    """The connected components of these rows, linked by shared files or groups, in the order of their first rows."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = [content[modality] for modality in pairs.modalities if modality != TEXT]
    if pairs.group is not None:
        links.append(_group_ids(pairs.group))
    edges = [(row, row) for row in rows]
    for ids in links:
        first: dict[int, int] = {}
        edges += [(row, first.setdefault(int(ids[row]), row)) for row in rows if ids[row] >= 0]
    graph = coo_array((np.ones(len(edges), bool), np.transpose(edges)), (len(pairs), len(pairs)))
    labels = connected_components(graph, directed=False)[1]
    pieces: dict[int, list[int]] = {}
    for row in rows:
        pieces.setdefault(int(labels[row]), []).append(row)
    return list(pieces.values())


def split_name(cell: str) -> str:
    """The canonical name of a split: `train`, `val`, or the lower-cased cell."""
    name = cell.strip().lower()
    if name in ("", *_TRAIN):
        return "train"
    return "val" if name in _VAL else name


#: Splits that are not test splits.
NOT_TESTS = ("train", "val")


def test_splits(split: Sequence[str]) -> list[str]:
    """The names of the test splits, in the table's order."""
    return [name for name in dict.fromkeys(split) if name not in NOT_TESTS]
