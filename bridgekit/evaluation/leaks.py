"""Leaks: validation or test rows that duplicate rows of an earlier split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bridgekit.errors import BridgekitError
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.tables.seen import Contents, Ids, TrainingRows
from bridgekit.tables.splits import NOT_TESTS


def leaks(split: Sequence[str], ids: Ids, contents: Contents) -> list[tuple[int, int]]:
    """Rows whose items are all in one row of an earlier split: of `train`, or, for test rows, of `val`.

    Arguments:
        split: each row's split.
        ids, contents: see `bridgekit.tables.seen`.

    Returns:
        (row, earlier row) indices from 0.
    """
    names = np.asarray(split)
    found: dict[int, int] = {}
    for earlier, later in ((("train",), names != "train"), (NOT_TESTS, ~np.isin(names, NOT_TESTS))):
        before = np.flatnonzero(np.isin(names, earlier))
        for row in np.flatnonzero(TrainingRows.of(ids, contents, before).whole(ids, contents) & later).tolist():
            found.setdefault(row, _same_row(row, before, ids))
    return sorted(found.items())


def _same_row(row: int, among: NDArray[np.int64], ids: Ids) -> int:
    """The first of some rows that has all items of a row; one must exist."""
    same = np.ones(len(among), bool)
    for own in ids.values():
        same &= (own[among] == own[row]) | (own[row] < 0)
    return int(among[same.argmax()])


def refuse_leaks(encoded: EncodedPairs, split: NDArray[np.str_]) -> None:
    """Raise BridgekitError if a validation or test row duplicates a row that training sees."""
    found = leaks(split.tolist(), encoded.ids, encoded.contents)
    if found:
        rows = encoded.pairs.rows
        listed = [f"row {rows[row]} ({split[row]}) = row {rows[other]} ({split[other]})" for row, other in found[:5]]
        more = f", and {len(found) - 5:,} more" if len(found) > 5 else ""
        raise BridgekitError(
            f"{len(found):,} {'row duplicates a row' if len(found) == 1 else 'rows duplicate rows'} of another split; "
            f"metrics would be inflated: {', '.join(listed)}{more}",
            where=encoded.pairs.source,
            remedy="put both in the same split, or remove one; `bridgekit check` lists them all",
        )
