"""Data classes of table checks: findings, split summaries, and the inspected table that all checks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bridgekit.encoders import Item
from bridgekit.pairs import Pairs, SetAside
from bridgekit.tables.seen import Contents, Ids

#: Worst first. `align` rejects tables with errors; warnings hurt training or evaluation; notes are for information.
GRADES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Arguments:
        kind: machine-readable: `set aside`, `leak`, `duplicate`, `silence`, `length`, `latents`, ...
        grade: one of `GRADES`.
        what: one sentence, with counts.
        remedy: how to fix it.
        items: the rows and items concerned, one line each.
    """

    kind: str
    grade: str
    what: str
    remedy: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitSummary:
    """The size of a split.

    Arguments:
        rows, groups: number of rows, and of distinct groups; None if the table has no groups.
        distinct: modality to number of distinct items.
        chance: direction to k to expected recall@k of a random ranking, for test splits; None for others.
    """

    rows: int
    groups: int | None
    distinct: Mapping[str, int]
    chance: Mapping[str, Mapping[int, float]] | None


@dataclass(frozen=True)
class TableReport:
    """The result of `check_pairs`.

    Arguments:
        source: the table.
        rows: number of usable rows.
        set_aside: the other rows.
        own_splits: whether the table defines splits. If not, `splits` are those that `align` will create.
        splits: name to summary.
        figures: modality to statistics of its items: lengths, and how much their latents have in common.
        findings: worst first.
    """

    source: str
    rows: int
    set_aside: Sequence[SetAside]
    own_splits: bool
    splits: Mapping[str, SplitSummary]
    figures: Mapping[str, Mapping[str, float]]
    findings: Sequence[Finding]

    def count(self, grade: str) -> int:
        """The number of findings with this grade."""
        return sum(finding.grade == grade for finding in self.findings)


@dataclass(frozen=True)
class Inspected:
    """The result of inspecting one item.

    Arguments:
        content: its content hash; None if it is unusable.
        failure: why it is unusable.
        length: seconds of audio, or characters of text.
        faults: kind of fault to details.
    """

    content: bytes | None = None
    failure: str | None = None
    length: float | None = None
    faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checked:
    """A table with inspected items, the input of all checks.

    Arguments:
        pairs, split: its n usable rows, and each row's split.
        ids, contents: see `bridgekit.tables.seen`.
        inspected: modality to item to inspection result.
    """

    pairs: Pairs
    split: NDArray[np.str_]
    ids: Ids
    contents: Contents
    inspected: Mapping[str, Mapping[Item, Inspected]]

    def describe(self, row: int, modality: str, why: str = "") -> str:
        """One line about an item."""
        item = str(self.pairs.columns[modality][row] or "")
        return f"row {self.pairs.rows[row]} ({self.split[row]}), {modality}: {item[:100]}{f' ({why})' if why else ''}"

    def distinct(self, modality: str) -> dict[int, Inspected]:
        """The first row of each distinct item, to the result of its inspection."""
        items, inspected = self.pairs.columns[modality], self.inspected[modality]
        first = np.unique(self.ids[modality], return_index=True)[1].tolist()
        return {row: inspected[item] for row in first if (item := items[row]) is not None}


def count_of(count: int, noun: str) -> str:
    """A count with its noun in singular or plural."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
