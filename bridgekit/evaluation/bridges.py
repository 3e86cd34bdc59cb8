"""Recall@k of a trained bridge on its own tables or another one, excluding rows seen in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridgekit.bridge.bridge import Bridge
from bridgekit.bridge.provenance import TrainedOn
from bridgekit.encoders import TEXT
from bridgekit.errors import BridgekitError, ItemError
from bridgekit.evaluation.leaks import refuse_leaks
from bridgekit.evaluation.recall import evaluate_splits, sides_of
from bridgekit.latents.encoded import encode_pairs
from bridgekit.media import content_hash
from bridgekit.pairs import Pairs, SetAside
from bridgekit.progress import Report, silent
from bridgekit.tables.reading import Table
from bridgekit.tables.splits import NOT_TESTS, split_pairs, test_splits


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Which rows an evaluation uses.

    Arguments:
        pairs: a table, folder, source or `Pairs` with two or more of the bridge's modalities; None for the tables the bridge
            was trained on, with the same splits.
        splits: which splits; by default all but `train` and `val`. Another table without splits is used entirely.
        unseen: set aside rows of `pairs` that were seen in training, instead of failing. Splits named `train` or `val` are
            used unchanged.
        outside: let tables refer to files outside their own folders.
        columns: modality to the name of its column in `pairs`, where that is not the modality's.
    """

    pairs: Any = None
    splits: Sequence[str] | None = None
    unseen: bool = False
    outside: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)


def evaluate_bridge(
    bridge: Bridge, options: EvalOptions, report: Report = silent
) -> tuple[list[dict[str, Any]], Sequence[SetAside]]:
    """Recall@k of a trained bridge on a table.

    Returns:
        records as in `evaluate_splits`, and the rows set aside. For the bridge's own tables these include test rows that were
        not in a test split when it was trained.

    Raises:
        BridgekitError: the table cannot be read, has no such split, has test rows in train, or is another table with rows
            seen in training and `unseen` is off.
    """
    if options.pairs is not None:
        table = bridge.open_other(options.pairs, options.columns, outside=options.outside)
        return _evaluate_table(bridge, table.pairs(sides_in(bridge, table)), None, options, report)
    records: list[dict[str, Any]] = []
    set_aside: list[SetAside] = []
    for own in bridge.tables:
        table = bridge.open_own(own, outside=options.outside)
        found, left_out = _evaluate_table(bridge, table.pairs(own.modalities), own, options, report)
        # A table used to bind a modality is evaluated for that modality only: the others may have been trained on its rows.
        records += [record for record in found if not own.bound or own.bound in sides_of(record)]
        set_aside += left_out
    return records, set_aside


def _evaluate_table(
    bridge: Bridge, table: Pairs, own: TrainedOn | None, options: EvalOptions, report: Report
) -> tuple[list[dict[str, Any]], Sequence[SetAside]]:
    sides = [modality for modality in table.modalities if modality in bridge.sides]
    if len(sides) < 2:
        raise BridgekitError(
            f"the table has fewer than two of the bridge's modalities ({', '.join(bridge.sides)})", where=table.source
        )
    encoded = encode_pairs(table, {modality: bridge.encoder(modality) for modality in sides}, report)
    if own:
        split = list(split_pairs(encoded.pairs, own.seed, encoded.ids))
        refuse_leaks(encoded, np.asarray(split))
        seen = bridge.training_rows.whole(encoded.ids, encoded.contents)
    else:
        split = list(encoded.pairs.split or ["all"] * len(encoded.pairs))
        seen = bridge.training_rows.files(encoded.ids, encoded.contents)
    wanted = list(options.splits or test_splits(split))
    unknown = [name for name in wanted if name not in split]
    if unknown or not wanted:
        raise BridgekitError(
            f"the table has no split {unknown[0]!r}" if unknown else "the table has no test split",
            where=table.source,
            remedy=f"choose one with --split: {', '.join(dict.fromkeys(split))}",
        )
    queried = np.isin(split, [name for name in wanted if name not in NOT_TESTS])
    left_out = set_aside_seen(
        encoded.pairs, np.flatnonzero(queried), np.flatnonzero(queried & seen), refuse=not (own or options.unseen)
    )
    # For other queries they are distractors, like training rows, never relevant items.
    split = ["train" if queried[row] and seen[row] else name for row, name in enumerate(split)]
    wanted = [name for name in wanted if name in split]
    records = evaluate_splits(encoded, split, bridge.project, bridge.method(*sides), wanted, bridge.banks)
    return records, (*encoded.pairs.set_aside, *left_out)


def set_aside_seen(table: Pairs, rows: NDArray[np.int64], seen: NDArray[np.int64], *, refuse: bool) -> list[SetAside]:
    """Set aside the query rows that were seen in training.

    Raises:
        BridgekitError: some were seen and `refuse` is on, or all were.
    """
    what = f"{len(seen):,} of {len(rows):,} rows were seen in training"
    if len(seen) and refuse:
        raise BridgekitError(
            f"{what}, or their files were: metrics would be inflated",
            where=f"{table.source}, first row {table.rows[seen[0]]}",
            remedy="set them aside with --unseen, or omit --pairs to use the test rows of the bridge's own table",
        )
    if len(seen) and len(seen) == len(rows):
        raise BridgekitError(f"{what}: none is left", where=table.source, remedy="give a table with other rows")
    column = next((modality for modality in table.modalities if modality != TEXT), TEXT)
    return [
        SetAside(table.rows[row], column, str(table.columns[column][row] or "")[:200], "seen in training")
        for row in seen.tolist()
    ]


def sides_in(bridge: Bridge, table: Table) -> tuple[str, ...]:
    """The bridge's modalities that a table has columns for; all of them if there are fewer than two."""
    there = [modality for modality in table.modalities if modality in bridge.sides]
    return tuple(there if len(there) > 1 else bridge.sides)


def leave_out_seen(
    bridge: Bridge, table: Pairs, rows: Sequence[int], modality: str, *, refuse: bool
) -> tuple[list[int], list[SetAside]]:
    """The rows whose item of a modality was not in any training pair, and the other rows set aside.

    Rows of splits named `train` or `val` are kept.

    Raises:
        BridgekitError: some were seen and `refuse` is on, or all were.
    """
    if not bridge.training_rows:
        return list(rows), []
    contents: list[bytes] = []
    ids = np.full(len(rows), -1)
    for position, row in enumerate(rows):
        item = table.columns[modality][row]
        if item is not None and not (table.split and table.split[row] in NOT_TESTS):
            with suppress(ItemError):  # unreadable items are reported later
                contents.append(content_hash(item))
                ids[position] = len(contents) - 1
    seen = bridge.training_rows.whole({modality: ids}, {modality: contents})
    queries = np.asarray(rows)
    return queries[~seen].tolist(), set_aside_seen(table, queries, queries[seen], refuse=refuse)
