"""What a check of a table gives: findings, sizes of splits, and the table as all checks see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridgekit.encoders import Item
from bridgekit.pairs import Pairs, SetAside
from bridgekit.tables.seen import Contents, Ids

#: From the worst. `align` refuses a table with an error; a warning spoils what is learnt or measured; a note is worth knowing.
GRADES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a table, or worth knowing about it.

    Arguments:
        kind: `set aside`, `leak`, `duplicate`, `silence`, `length`, `latents`, ...: for programs.
        grade: one of `GRADES`.
        what: one sentence, with counts.
        remedy: what to do about it.
        items: the rows and items it is about, a line each.
    """

    kind: str
    grade: str
    what: str
    remedy: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class SplitSummary:
    """How large a split is.

    Arguments:
        rows: how many.
        groups: how many different groups they have; None where the table has no groups.
        distinct: modality to how many different items.
        chance: for a split to test by, direction to k to the recall@k of a random order; None for the others.
    """

    rows: int
    groups: int | None
    distinct: Mapping[str, int]
    chance: Mapping[str, Mapping[int, float]] | None


@dataclass(frozen=True)
class TableReport:
    """What `check_pairs` found.

    Arguments:
        source: the table.
        rows: how many of its rows can be used.
        set_aside: the others.
        own_splits: whether the table says which split a row is in. If not, `splits` are what `align` will make of it.
        splits: name to its size.
        figures: modality to readable figures about its items: lengths, and how much their latents have in common.
        findings: the worst first.
    """

    source: str
    rows: int
    set_aside: Sequence[SetAside]
    own_splits: bool
    splits: Mapping[str, SplitSummary]
    figures: Mapping[str, Mapping[str, float]]
    findings: Sequence[Finding]

    def count(self, grade: str) -> int:
        """How many findings have a grade."""
        return sum(finding.grade == grade for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self) | {"set_aside": [vars(row) for row in self.set_aside]}


@dataclass(frozen=True)
class Look:
    """What one item is like.

    Arguments:
        content: its content hash; None where it cannot be used.
        failure: why not.
        length: seconds of sound, or characters of text.
        faults: kinds of fault, each with a readable figure.
    """

    content: bytes | None = None
    failure: str | None = None
    length: float | None = None
    faults: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checked:
    """A table whose items were looked at: what all checks start from.

    Arguments:
        pairs: its n usable rows.
        split: each row's split.
        ids, contents: see `bridgekit.tables.seen`.
        looks: modality to item to what it is like.
    """

    pairs: Pairs
    split: NDArray[np.str_]
    ids: Ids
    contents: Contents
    looks: Mapping[str, Mapping[Item, Look]]

    def told(self, row: int, modality: str, why: str = "") -> str:
        """One item, for a person."""
        item = str(self.pairs.columns[modality][row] or "")
        return f"row {self.pairs.rows[row]} ({self.split[row]}), {modality}: {item[:100]}{f' ({why})' if why else ''}"

    def first_rows(self, modality: str) -> NDArray[np.int64]:
        """For each content of a modality the first row that has it."""
        there = np.flatnonzero(self.ids[modality] >= 0)
        return there[np.unique(self.ids[modality][there], return_index=True)[1]]


def count_of(count: int, noun: str) -> str:
    """A count with its noun, in the singular or the plural."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
