"""`report`: write an HTML report about a bridge and its tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bridgekit.bridge.bridge import Bridge
from bridgekit.checks.findings import Finding
from bridgekit.checks.table import check_table
from bridgekit.errors import BridgekitError
from bridgekit.evaluation.recall import evaluate_splits, sides_of
from bridgekit.latents.encoded import EncodedPairs, encode_pairs
from bridgekit.progress import Report, progress_bars
from bridgekit.report import FILE, TableResults, report_page, table_results
from bridgekit.storage.cache import write_atomically
from bridgekit.tables.reading import Table
from bridgekit.tables.splits import split_pairs


def write_report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    pairs: str | Path | None = None,
    check: bool = True,
    columns: Mapping[str, str] | None = None,
    outside: bool = False,
    progress: bool = True,
) -> Path:
    """Write a new report about a bridge, including a check of its tables.

    Arguments:
        folder: the bridge's folder.
        out: the file; by default `report.html` in the bridge's folder.
        pairs: another table, or the new path of the bridge's own.
        check: also check every file of the tables, as `bridgekit check` does.
        columns: modality to the name of its column in `pairs`, where that is not the modality's.
        outside: let a table refer to files outside its own folder.
        progress: show progress bars on standard error.

    Returns:
        the path of the report.

    Raises:
        BridgekitError: the bridge or its table cannot be read, or the file cannot be written.
    """
    bridge = Bridge.load(folder)
    with progress_bars(progress) as report:
        tables = _tables(bridge, pairs, columns, outside, report)
        findings: list[Finding] = []
        for table in tables if check else ():
            encoders = {modality: bridge.encoder(modality) for modality in table.pairs.modalities}
            findings += check_table(table.pairs, encoders, report).findings
        page = report_page(bridge, Path(folder).absolute().name, tables, findings=findings, report=report)
    file = Path(out) if out else Path(folder) / FILE
    write_atomically(file, lambda aside: aside.write_bytes(page))
    return file


def _tables(
    bridge: Bridge, pairs: str | Path | None, columns: Mapping[str, str] | None, outside: bool, report: Report
) -> list[TableResults]:
    """The tables that the bridge was trained on, or the given one: treated as the bridge's own if its split sizes match."""
    if pairs is None:
        found = []
        for own in bridge.tables:
            table = _opened(partial(bridge.open_own, own, outside=outside), own.source)
            encoded = _encode(bridge, table, own.modalities, report)
            names = np.asarray(split_pairs(encoded.pairs, own.seed, encoded.ids))
            if own.bound:  # the other rows were not used
                rows = np.flatnonzero(encoded.ids[own.bound] >= 0)
                encoded, names = encoded.take(rows), names[rows]
            found.append(table_results(bridge, encoded, names.tolist(), _records(bridge, own.bound)))
        return found
    table = _opened(lambda: bridge.open_other(pairs, columns or {}, outside=outside), pairs)
    sides = [modality for modality in table.modalities if modality in bridge.sides]
    encoded = _encode(bridge, table, sides if len(sides) > 1 else list(bridge.sides), report)
    with suppress(BridgekitError):  # a table that cannot be split is not the bridge's own
        split = split_pairs(encoded.pairs, bridge.tables[0].seed, encoded.ids)
        if Counter(split) == bridge.provenance.get("rows"):
            return [table_results(bridge, encoded, split, _records(bridge, None))]
    split = tuple(encoded.pairs.split or ("all",) * len(encoded.pairs))
    records = evaluate_splits(encoded, split, bridge.project, bridge.method(*sides), banks=bridge.banks)
    return [table_results(bridge, encoded, split, records, own=False)]


def _opened(table: Callable[[], Table], source: str | Path) -> Table:
    try:
        return table()
    except BridgekitError as error:
        remedy = "if it was moved, give its new path with --pairs" if not Path(source).exists() else error.remedy
        raise BridgekitError(error.what, where=error.where, remedy=remedy) from None


def _encode(bridge: Bridge, table: Table, modalities: Sequence[str], report: Report) -> EncodedPairs:
    return encode_pairs(table.pairs(modalities), {modality: bridge.encoder(modality) for modality in modalities}, report)


def _records(bridge: Bridge, bound: str | None) -> list[Mapping[str, Any]]:
    """The bridge's metrics on its first table, or on the one used to bind a modality."""
    later = {own.bound for own in bridge.tables if own.bound}
    return [record for record in bridge.metrics if (bound in sides_of(record) if bound else not later & sides_of(record))]
