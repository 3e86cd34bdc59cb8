"""`check`: find problems of a table before training on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

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
from bridgekit.encoders import TEXT, Encoder, Item
from bridgekit.errors import BridgekitError
from bridgekit.hardware import resolve_device
from bridgekit.pairs import EXTENSIONS, Pairs, SetAside
from bridgekit.plugins import default_modalities, encoder_name, load_encoder
from bridgekit.progress import progress_bars
from bridgekit.recipes.sides import choose_sides, takes
from bridgekit.tables.reading import Table, open_table
from bridgekit.tables.splits import NOT_TESTS, split_pairs


@dataclass(frozen=True)
class CheckOptions:
    """Options of `check_pairs`.

    Arguments:
        pairs: a table, folder, source or `Pairs`, as for `align`.
        a, b, more: modalities or encoders, as for `align`; by default all columns that are modalities. If no encoder for a
            modality is installed, its latents are not checked.
        latents: encode the items and check their latents. They are stored, so `align` will not encode them again.
        device, outside, progress: see `RunOptions`.
    """

    pairs: str | Path | Pairs
    a: str | None = None
    b: str | None = None
    _: KW_ONLY
    more: Sequence[str] = ()
    latents: bool = True
    device: str = "auto"
    outside: bool = False
    progress: bool = True


@takes(CheckOptions)
def check_pairs(options: CheckOptions) -> TableReport:
    """Check the rows, files, splits and latents of a table before training on it.

    `check_pairs(pairs, a, b, *, ...)`: takes the fields of `CheckOptions`.

    Raises:
        BridgekitError: the table cannot be read, has no usable row, or a named encoder is not installed.
    """
    with progress_bars(options.progress) as report:
        table = open_table(options.pairs, outside=options.outside)
        names = [name for name in (options.a, options.b, *options.more) if name]
        encoders, findings = _open_sides(table, names, options.device if options.latents else None)
        pairs = table.pairs(tuple(encoders))
        inspected = {modality: inspect_items(modality, pairs.columns[modality], report) for modality in encoders}
        checked, unsplit = _in_splits(_usable(pairs, inspected), inspected)
        findings += unsplit
        for check in CHECKS:
            findings += check(checked)
        figures = {modality: length_figures(checked, modality) for modality in encoders}
        for modality, encoder in encoders.items():
            if encoder is not None:
                found, statistics = latent_findings(checked, modality, encoder, report)
                findings += found
                figures[modality] |= statistics
    findings.sort(key=lambda finding: GRADES.index(finding.grade))
    own = checked.pairs
    names = [name for name in dict.fromkeys((*NOT_TESTS, *checked.split.tolist())) if name in checked.split]
    splits = {name: split_summary(checked, name) for name in names}
    return TableReport(own.source, len(own), own.set_aside, own.split is not None, splits, figures, tuple(findings))


def _open_sides(table: Table, names: Sequence[str], device: str | None) -> tuple[dict[str, Encoder | None], list[Finding]]:
    """Modality to its encoder; None if none is installed or no device is given."""
    if not names:
        known = {*EXTENSIONS, TEXT, *default_modalities()}
        names = [name for name in table.modalities if name in known]
        names = names if len(names) > 1 else choose_sides((None, None), table)
    encoders: dict[str, Encoder | None] = {}
    findings = []
    for name in names:
        encoder = None
        try:
            if device or ":" in name:
                encoder = load_encoder(encoder_name(name), resolve_device(device or "cpu"))
        except BridgekitError as error:
            if ":" in name:
                raise
            what = f"the latents of {name} were not checked: {error.what}"
            findings.append(Finding("encoder", "note", what, error.remedy or "install a plugin with an encoder for it"))
        encoders[encoder.modality if encoder else name] = encoder if device else None
    return encoders, findings


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
        split = table.split or ("all",) * len(table)
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
