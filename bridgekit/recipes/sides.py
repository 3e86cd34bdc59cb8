"""Which sides a run has: modalities or encoders by name, opened, and the table that has their items."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bridgekit.encoders import TEXT, Encoder
from bridgekit.errors import BridgekitError
from bridgekit.pairs import Pairs
from bridgekit.plugins import default_modalities, default_pair_source, encoder_name, load_encoder, recorded_name
from bridgekit.progress import Report
from bridgekit.tables.reading import listed_columns, read_pairs, table_modalities


def choose_sides(a: str | None, b: str | None, more: Sequence[str], pairs: str | Path | Pairs | None) -> list[str]:
    """The modalities or encoders to align: the named ones, or those of the table's columns that have a default encoder.

    Of a table with fewer than two such columns, reading it will tell what is missing.
    """
    if a or b or more or pairs is None:
        return [a or "audio", b or TEXT, *more]
    columns = table_modalities(pairs)
    known = [column for column in columns if column in default_modalities() and column != TEXT]
    if columns and not known and TEXT not in columns:
        raise BridgekitError(
            f"no column of the table is a modality; its columns are {listed_columns(columns)}",
            where=pairs.source if isinstance(pairs, Pairs) else str(pairs),
            remedy=f"rename headers to {', '.join(sorted(default_modalities()))}, or say with --a and --b what the columns are",
        )
    return [*(known or ["audio"]), *([TEXT] if len(known) < 2 or TEXT in columns else [])]


def open_encoders(names: Sequence[str], device: str, report: Report) -> dict[str, tuple[str, Encoder]]:
    """Modality to the full name and the opened encoder of each side."""
    opened: dict[str, tuple[str, Encoder]] = {}
    for number, name in enumerate(names):
        full = encoder_name(name)
        report("opening encoders", number, len(names))
        encoder = load_encoder(full, device)
        if encoder.modality in opened:
            raise BridgekitError(
                f"two sides are {encoder.modality}", where=", ".join(names), remedy="name different modalities"
            )
        opened[encoder.modality] = (recorded_name(full, encoder), encoder)
    report("opening encoders", len(names), len(names))
    return opened


def open_table(pairs: str | Path | Pairs | None, modalities: tuple[str, ...], tell: bool, outside: bool = False) -> Pairs:
    """The named table, or the one that a plugin brings for these modalities."""
    if isinstance(pairs, Pairs):
        missing = [modality for modality in modalities if modality not in pairs.columns]
        if missing:
            raise BridgekitError(f"the table has no column {missing[0]!r}", where=pairs.source)
        return pairs
    if pairs is not None:
        return read_pairs(pairs, modalities, outside=outside)
    source = default_pair_source(modalities)
    if tell:  # it may be large, and its files may have to be made first
        print(f"Pairs: {source.name} ({source.description}), as no table was named", file=sys.stderr)
    return source.build()
