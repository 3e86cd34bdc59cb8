"""All checks of a table of pairs: rows, files, splits and latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bridgekit.checks.findings import GRADES, Checked, Finding, Inspected, TableReport
from bridgekit.checks.items import extreme_lengths, faulty_items, inspect_items, length_figures
from bridgekit.checks.latents import latent_findings
from bridgekit.checks.rows import (
    duplicate_rows,
    leaking_files,
    leaking_groups,
    leaking_rows,
    rows_set_aside,
    same_everywhere,
    split_summary,
)
from bridgekit.encoders import Encoder, Item
from bridgekit.errors import BridgekitError
from bridgekit.pairs import Pairs, SetAside
from bridgekit.progress import Report
from bridgekit.tables.splits import NOT_TESTS, split_pairs


def check_table(
    pairs: Pairs, encoders: Mapping[str, Encoder | None], report: Report, findings: Sequence[Finding] = ()
) -> TableReport:
    """Check the usable rows of a table.

    Arguments:
        pairs: the rows.
        encoders: modality to its encoder, or None to leave its latents unchecked.
        report: progress.
        findings: earlier findings, to be listed with the others.

    Raises:
        BridgekitError: no row is usable.
    """
    inspected = {modality: inspect_items(modality, pairs.columns[modality], report) for modality in encoders}
    checked, unsplit = _in_splits(_usable(pairs, inspected), inspected)
    found = [*findings, *unsplit, *(finding for check in CHECKS for finding in check(checked))]
    figures = {modality: length_figures(checked, modality) for modality in encoders}
    for modality, encoder in encoders.items():
        if encoder is not None:
            more, statistics = latent_findings(checked, modality, encoder, report)
            found += more
            figures[modality] |= statistics
    found.sort(key=lambda finding: GRADES.index(finding.grade))
    own = checked.pairs
    names = [name for name in dict.fromkeys((*NOT_TESTS, *checked.split.tolist())) if name in checked.split]
    splits = {name: split_summary(checked, name) for name in names}
    return TableReport(own.source, len(own), own.set_aside, own.split is not None, splits, figures, tuple(found))


def _usable(table: Pairs, inspected: Mapping[str, Mapping[Item, Inspected]]) -> Pairs:
    """The rows whose items can all be read; the others are added to `set_aside`."""
    bad: dict[int, SetAside] = {}
    for modality, each in inspected.items():
        for row, item in enumerate(table.columns[modality]):
            if item is not None and (why := each[item].failure) is not None:
                bad.setdefault(row, SetAside(table.rows[row], modality, str(item)[:200], why))
    set_aside = (*table.set_aside, *bad.values())
    usable = table.take(row for row in range(len(table)) if row not in bad)
    if not len(usable):
        first = f" (row {set_aside[0].row}: {set_aside[0].reason}: {set_aside[0].item})" if set_aside else ""
        raise BridgekitError(f"no row of the table is usable{first}", where=table.source, remedy="fix the files or paths")
    columns = {modality: usable.columns[modality] for modality in inspected}
    return Pairs(columns, usable.source, usable.rows, usable.split, usable.group, set_aside)


def _in_splits(table: Pairs, inspected: Mapping[str, Mapping[Item, Inspected]]) -> tuple[Checked, list[Finding]]:
    """The table with the splits that `align` will use, and a finding if it cannot be split."""
    ids: dict[str, NDArray[np.int64]] = {}
    contents: dict[str, list[bytes]] = {}
    for modality, items in table.columns.items():
        numbers: dict[bytes, int] = {}
        found = [-1 if item is None else inspected[modality][item].content for item in items]
        ids[modality] = np.array(
            [-1 if isinstance(one, int) else numbers.setdefault(one or b"", len(numbers)) for one in found]
        )
        contents[modality] = list(numbers)
    try:
        split = split_pairs(table, 0, ids)
        trouble = []
    except BridgekitError as error:
        split = tuple(table.split or ("all",) * len(table))
        trouble = [Finding("split", "error", error.what, error.remedy or "")]
    return Checked(table, np.asarray(split), ids, contents, inspected), trouble


CHECKS = (
    same_everywhere,
    leaking_rows,
    leaking_files,
    leaking_groups,
    rows_set_aside,
    faulty_items,
    extreme_lengths,
    duplicate_rows,
)
