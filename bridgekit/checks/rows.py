"""Checks of rows: duplicates, leaks between splits, rows set aside, and split sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from bridgekit.checks.findings import Checked, Finding, SplitSummary, count_of
from bridgekit.encoders import TEXT, Item
from bridgekit.evaluation.leaks import leaks
from bridgekit.evaluation.recall import chance, directions
from bridgekit.latents.encoded import EncodedPairs
from bridgekit.pairs import SetAside
from bridgekit.tables.splits import NOT_TESTS, relation_keys


def rows_set_aside(checked: Checked) -> Iterator[Finding]:
    """One finding per reason, ignoring numbers in it."""
    reasons: dict[str, list[SetAside]] = {}
    for row in checked.pairs.set_aside:
        reasons.setdefault(re.sub(r"\d[\d,.]*", "…", row.reason), []).append(row)
    total = len(checked.pairs.set_aside) + len(checked.pairs)
    for reason, rows in reasons.items():
        what = f"{len(rows):,} of {total:,} rows are set aside: {reason if len(rows) > 1 else rows[0].reason}"
        items = tuple(f"row {row.row}, {row.column}: {row.item}{f' ({row.reason})' if '…' in reason else ''}" for row in rows)
        yield Finding("set aside", "warning", what, "fix or remove them; training skips them", items)


def same_everywhere(checked: Checked) -> Iterator[Finding]:
    """Columns with the same item in every row."""
    for modality, contents in checked.contents.items():
        if len(contents) < 2:
            what = f"every row has the same {modality}: there is nothing to learn"
            yield Finding("variety", "error", what, "add other pairs")


def leaking_rows(checked: Checked) -> Iterator[Finding]:
    """Validation or test rows that duplicate rows of an earlier split."""
    found = leaks(checked.split.tolist(), checked.ids, checked.contents)
    what = f"{count_of(len(found), 'validation or test row')} also seen in training: metrics would be inflated"
    items = tuple(
        f"row {checked.pairs.rows[row]} ({checked.split[row]}) = row {checked.pairs.rows[other]} ({checked.split[other]})"
        for row, other in found
    )
    if found:
        yield Finding("leak", "error", what, "put both in the same split, or remove one", items)


def leaking_files(checked: Checked) -> Iterator[Finding]:
    """Validation or test items that are also in train, in rows that are not duplicates."""
    whole = {row for row, _ in leaks(checked.split.tolist(), checked.ids, checked.contents)}
    for modality, ids in checked.ids.items():
        seen = set(ids[(checked.split == "train") & (ids >= 0)].tolist())
        rows = [row for row in np.flatnonzero(checked.split != "train").tolist() if int(ids[row]) in seen and row not in whole]
        count = len({int(ids[row]) for row in rows})
        items = tuple(checked.describe(row, modality) for row in rows)
        if modality != TEXT and rows:
            what = f"{count_of(count, f'{modality} file')} of other splits also in train, in other pairs"
            remedy = "put all rows of a file in the same split, unless the file represents a class"
            yield Finding("file leak", "warning", what, remedy, items)
        elif rows:
            what = f"{count_of(count, 'text')} of other splits also in train"
            yield Finding("text leak", "note", what, "nothing to do if texts are class names", items)


def leaking_groups(checked: Checked) -> Iterator[Finding]:
    """Groups with rows in train and in another split."""
    groups: dict[str, set[str]] = {}
    for name, split in zip(checked.pairs.group or (), checked.split.tolist(), strict=False):
        if name:
            groups.setdefault(name, set()).add(split)
    crossing = {name: splits for name, splits in groups.items() if "train" in splits and len(splits) > 1}
    what = f"train shares {count_of(len(crossing), 'group')} with other splits"
    items = tuple(f"group {name}: {', '.join(sorted(splits))}" for name, splits in crossing.items())
    remedy = "nothing to do if groups are classes; if they are speakers or recordings, keep each in one split"
    if crossing:
        yield Finding("group leak", "note", what, remedy, items)


def duplicate_rows(checked: Checked) -> Iterator[Finding]:
    """Rows and files with identical content under different names."""
    first: dict[tuple[object, ...], int] = {}
    same = []
    for row in range(len(checked.pairs)):
        key = (checked.split[row], *(int(ids[row]) for ids in checked.ids.values()))
        if (other := first.setdefault(key, row)) != row:
            same.append(f"row {checked.pairs.rows[row]} ({checked.split[row]}) = row {checked.pairs.rows[other]}")
    if same:
        what = f"{count_of(len(same), 'row')} with the same content as another row of the same split, under other names"
        yield Finding("duplicate", "warning", what, "remove them: they count twice", tuple(same))
    for modality, inspected in checked.inspected.items():
        names: dict[bytes, list[Item]] = {}
        for item, found in inspected.items():
            if found.content is not None:
                names.setdefault(found.content, []).append(item)
        several = [items for items in names.values() if len(items) > 1]
        if modality != TEXT and several:
            what = f"{count_of(len(several), f'{modality} file')} under several names"
            items = tuple(" = ".join(map(str, items)) for items in several)
            yield Finding("duplicate file", "note", what, "nothing to do: they count as one item", items)


def split_summary(checked: Checked, name: str) -> SplitSummary:
    """The size of a split, and its chance recall."""
    rows = np.flatnonzero(checked.split == name)
    group = checked.pairs.group
    groups = None if group is None else len({group[row] for row in rows.tolist()} - {""})
    distinct = {modality: len(np.unique(ids[rows][ids[rows] >= 0])) for modality, ids in checked.ids.items()}
    if name in NOT_TESTS:
        return SplitSummary(len(rows), groups, distinct, None)
    table = EncodedPairs(checked.pairs, {}, checked.ids, relation_keys(checked.pairs, checked.ids))
    by_chance = {f"{a} → {b}": chance(table, rows, a, b, "split", (1, 5, 10)) for a, b in directions(table, rows)}
    return SplitSummary(len(rows), groups, distinct, by_chance)
