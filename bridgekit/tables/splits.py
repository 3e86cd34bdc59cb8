"""Which rows to train on, to validate on and to test on, and which rows are related."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError
from bridgekit.pairs import Content, Pairs

MIN_ROWS = 10  # to learn anything, and to leave one row each for validation and test

_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "dev")


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
    names = ["train"] * count if pairs.split is None else [split_name(name) for name in pairs.split]
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


def split_name(cell: str) -> str:
    """The canonical name of a split: `train`, `val`, or as the table has it."""
    name = cell.strip().lower()
    if name in ("", *_TRAIN):
        return "train"
    return "val" if name in _VAL else name


#: Splits that are not for reporting.
NOT_TESTS = ("train", "val")


def test_splits(split: Sequence[str]) -> list[str]:
    """The names of the splits that are for reporting, in the table's order."""
    return [name for name in dict.fromkeys(split) if name not in NOT_TESTS]
