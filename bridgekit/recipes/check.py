"""`check`: what is wrong with a table, or worth knowing about it, before anybody trains on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bridgekit.checks.findings import GRADES, Checked, Finding, Look, TableReport
from bridgekit.checks.items import extreme_lengths, faulty_items, length_figures, look_at_all
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
    """What `check_pairs` is asked to do.

    Arguments:
        pairs: a table, folder, source or `Pairs`, as for `align`.
        a, b, more: modalities or encoders, as for `align`; by default all columns that are modalities. A modality without an
            installed encoder is checked without its latents.
        latents: encode the items and check their latents. They are kept: `align` will not encode them again.
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
    """Check a table before anybody trains on it: its rows, its files, its splits, and what encoders make of its items.

    `check_pairs(pairs, a, b, *, ...)`: the arguments are those of `CheckOptions`.

    Raises:
        BridgekitError: the table cannot be read, none of its rows can be used, or a named encoder is not there.
    """
    with progress_bars(options.progress) as report:
        table = open_table(options.pairs, outside=options.outside)
        names = [name for name in (options.a, options.b, *options.more) if name]
        encoders, findings = _open_sides(table, names, options.device if options.latents else None)
        pairs = table.pairs(tuple(encoders))
        looks = {modality: look_at_all(modality, pairs.columns[modality], report) for modality in encoders}
        checked, unsplit = _in_splits(_usable(pairs, looks), looks)
        findings += unsplit
        for check in CHECKS:
            findings += check(checked)
        figures = {modality: length_figures(checked, modality) for modality in encoders}
        for modality, encoder in encoders.items():
            if encoder is not None:
                found, about = latent_findings(checked, modality, encoder, report)
                findings += found
                figures[modality] |= about
    findings.sort(key=lambda finding: GRADES.index(finding.grade))
    own = checked.pairs
    names = [name for name in dict.fromkeys((*NOT_TESTS, *checked.split.tolist())) if name in checked.split]
    splits = {name: split_summary(checked, name) for name in names}
    return TableReport(own.source, len(own), own.set_aside, own.split is not None, splits, figures, tuple(findings))


def _open_sides(table: Table, names: Sequence[str], device: str | None) -> tuple[dict[str, Encoder | None], list[Finding]]:
    """Modality to its encoder, or None where none is installed or, without a device, wanted."""
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
            findings.append(Finding("encoder", "note", what, error.remedy or "install a plugin that has an encoder for it"))
        encoders[encoder.modality if encoder else name] = encoder if device else None
    return encoders, findings


def _usable(table: Pairs, looks: Mapping[str, Mapping[Item, Look]]) -> Pairs:
    """The rows all of whose items can be read; the others join those set aside."""
    bad: dict[int, SetAside] = {}
    for modality, each in looks.items():
        for row, item in enumerate(table.columns[modality]):
            if item is not None and (why := each[item].failure) is not None:
                bad.setdefault(row, SetAside(table.rows[row], modality, str(item)[:200], why))
    set_aside = (*table.set_aside, *bad.values())
    usable = table.take(row for row in range(len(table)) if row not in bad)
    if not len(usable):
        first = f" (row {set_aside[0].row}: {set_aside[0].reason}: {set_aside[0].item})" if set_aside else ""
        raise BridgekitError(
            f"no row of the table can be used{first}", where=table.source, remedy="mend the files or the paths"
        )
    columns = {modality: usable.columns[modality] for modality in looks}
    return Pairs(columns, usable.source, usable.rows, usable.split, usable.group, set_aside)


def _in_splits(table: Pairs, looks: Mapping[str, Mapping[Item, Look]]) -> tuple[Checked, list[Finding]]:
    """The table with the splits that `align` will take, and what stands in the way of that."""
    ids: dict[str, NDArray[np.int64]] = {}
    contents: dict[str, list[bytes]] = {}
    for modality, items in table.columns.items():
        numbers: dict[bytes, int] = {}
        found = [-1 if item is None else looks[modality][item].content for item in items]
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
    return Checked(table, np.asarray(split), ids, contents, looks), trouble


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
